"""Weights files: recognizing their formats, and reading, writing and converting their tensors."""
