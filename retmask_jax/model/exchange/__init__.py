"""What goes out of the package as a file and comes back bit for bit, and is no part of a checkpoint: masks."""
