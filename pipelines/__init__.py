"""Images: requests, the worker pool and the FLUX step engine. Knows no HTTP."""
