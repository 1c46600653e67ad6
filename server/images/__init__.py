"""Encodes, marks, signs and stores finished images; fetches and decodes source pictures."""
