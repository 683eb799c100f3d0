"""Steps compiled for machines that are not here: what they take, and whether that fits."""
