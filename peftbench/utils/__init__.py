"""What every folder needs, and nothing of the method."""
