"""`srpo weights`: one module a subcommand."""
