"""Worker processes, one a device: the pool that feeds them, the step loop inside them."""
