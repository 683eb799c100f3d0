"""Lists of heads, whoever made them: files in the forms that others publish and read, how far lists overlap, and budgets of
keys by them."""
