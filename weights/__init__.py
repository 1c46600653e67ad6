"""Files: which checkpoints exist, where they lie, how they are read. Knows no image."""
