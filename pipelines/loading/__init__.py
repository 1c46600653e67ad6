"""From settings to a ready engine: built, placed in memory, fingerprinted and checked."""
