"""The `srpo` command: one row a subcommand."""

import sys
from collections.abc import Mapping

from server.cli.commands import Command, run

COMMANDS: Mapping[str, Command] = {
    "serve": Command("serve the HTTP API", "server.cli.serve:main"),
    "generate": Command("draw images without a server, from prompts or a JSONL file", "server.cli.generate:main"),
    "verify": Command("read an image file's marks: made by a model? with which parameters?", "server.cli.verify:main"),
    "selfcheck": Command("draw the fixed pictures, and compare them with earlier ones", "server.cli.selfcheck:main"),
    "bench": Command("measure speed or quality on this device (from a checkout)", "server.cli.bench:main"),
    "doctor": Command("say what stands and what is missing, before serving", "server.cli.doctor:main"),
    "weights": Command("bring, check, look into and convert model files", "server.cli.weights:main"),
    "jobs": Command("list and cancel jobs", "server.cli.jobs:main"),
    "keys": Command("make an API key and the hash line for SRPO_API_KEYS_FILE", "server.cli.serve:make_key"),
}


def main() -> int:
    return run("srpo", COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
