"""Finished pictures encoded, marked, signed and stored; source pictures fetched and decoded."""
