"""Model files: which checkpoints exist, where they lie, how they are fetched, read and converted. Knows no images."""
