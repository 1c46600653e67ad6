"""A table of commands: `srpo COMMAND`, and the groups of commands below it."""

import importlib
import sys
from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """A command: its one-line help, and the function that takes its arguments and returns the exit code."""

    help: str
    function: str


def usage(program: str, commands: Mapping[str, Command]) -> str:
    rows = "\n".join(f"  {name:<10} {command.help}" for name, command in commands.items())
    return (
        f"usage: {program} COMMAND [options]\n\ncommands:\n{rows}\n\n"
        f"`{program} COMMAND --help` lists a command's options."
    )


def run(program: str, commands: Mapping[str, Command], arguments: list[str]) -> int:
    """Carry out the command that the first argument names. Returns the exit code."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage(program, commands))
        return 0
    if name not in commands:
        print(f"{program}: there is no command {name!r}\n\n{usage(program, commands)}", file=sys.stderr)
        return 2
    module, _, function = commands[name].function.partition(":")
    code: int = getattr(importlib.import_module(module), function)(rest)
    return code
