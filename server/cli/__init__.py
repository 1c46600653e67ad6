"""The command line: one module a subcommand of `srpo`; the table of them is `server.__main__`."""
