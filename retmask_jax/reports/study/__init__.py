"""The page of the causal study and the sections that only this page has, each with its figures."""
