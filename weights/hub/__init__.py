"""Fetching the files of published models, and verifying them."""
