"""What models are measured by, and how they are compared. No files of a run."""
