"""Lists of heads, whoever made them: files in the forms that others publish and read, and how far lists overlap."""
