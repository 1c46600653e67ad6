"""The `srpo` command: one row a subcommand."""

import importlib
import sys
from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: its one-line help, and the function that takes its arguments and returns the exit code."""

    help: str
    function: str


COMMANDS: Mapping[str, Command] = {
    "serve": Command("serve the HTTP API", "server.serve:main"),
    "generate": Command("draw images without a server, from prompts or a JSONL file", "server.generate:main"),
    "verify": Command("read an image file's marks: made by a model? with which parameters?", "server.verify:main"),
    "selfcheck": Command("draw the fixed pictures, and compare them with earlier ones", "server.selfcheck:main"),
    "bench": Command("measure speed or quality on this device (from a checkout)", "server.bench:main"),
    "jobs": Command("list and cancel jobs", "server.ledger_cli:main"),
    "keys": Command("make an API key and the hash line for SRPO_API_KEYS_FILE", "server.serve:make_key"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<10} {command.help}" for name, command in COMMANDS.items())
    return f"usage: srpo COMMAND [options]\n\ncommands:\n{rows}\n\n`srpo COMMAND --help` lists a command's options."


def main() -> int:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"srpo: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name].function.partition(":")
    code: int = getattr(importlib.import_module(module), function)(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
