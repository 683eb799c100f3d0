"""Several models side by side: results of other runs, what they have in common, and the page and pictures of it."""
