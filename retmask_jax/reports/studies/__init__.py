"""The page of the causal study and its sections, each with its figures; heads, knock-out and rotary pairs lie above."""
