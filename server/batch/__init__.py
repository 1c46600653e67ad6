"""Requests from a file, drawn without HTTP: by this machine into a folder, or by a cluster into a bucket."""
