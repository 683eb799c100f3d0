"""`retmask bench`: our library and the tools of others, run side by side, with the ratio of their times. Nothing else in
the package calls these modules."""
