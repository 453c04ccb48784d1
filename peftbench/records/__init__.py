"""Records: what a run leaves on disk."""
