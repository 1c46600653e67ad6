"""Every setting: its name, default and meaning. The only reader of the environment.

Each field is an environment variable (`SRPO_PORT`) and a flag (`--port`); `srpo serve --help` and the table in
docs/configuration.md are generated from here.
"""
