"""All rows of the table of faults: one module a kind, one entry a row."""

from faults import access, bad_input, storage, strangers, workers

FAULTS = (*strangers.FAULTS, *workers.FAULTS, *storage.FAULTS, *access.FAULTS, *bad_input.FAULTS)
