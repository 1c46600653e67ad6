"""The database in which a server keeps its records: its schema, its transactions, and its failures as our errors."""
