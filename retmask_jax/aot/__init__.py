"""Programs compiled for machines that are not here: how much memory and time they take, and whether they fit. Nothing
is run."""
