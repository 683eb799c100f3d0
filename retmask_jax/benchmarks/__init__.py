"""`retmask bench`: ours against peers in one run, with the ratio. Nothing else calls these modules."""
