"""Other libraries on the same tasks, each in its own environment."""
