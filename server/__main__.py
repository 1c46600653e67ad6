"""The `srpo` command: one row a subcommand."""

import sys
from collections.abc import Mapping

from server.cli.terminal.parsing import Command, Group, run
from weights.version import read_version

WEIGHTS: Mapping[str, Command] = {
    "pull": Command("bring a model's published files, verified", "server.cli.weights.pull:main"),
    "verify": Command("compare pulled files with their manifest", "server.cli.weights.verify:main"),
    "inspect": Command("say what a file or folder holds, from its headers", "server.cli.weights.inspect:main"),
    "convert": Command("write a transformer in bf16, fp8 or 4-bit", "server.cli.weights.convert:main"),
}
COMMANDS: Mapping[str, Command | Group] = {
    "serve": Command("serve the HTTP API", "server.cli.serve:main"),
    "generate": Command(
        "draw images without a server, from prompts or a JSONL file", "server.cli.generate.command:main"
    ),
    "verify": Command("read an image file's marks: made by a model? with which parameters?", "server.cli.verify:main"),
    "selfcheck": Command("draw the fixed pictures, and compare them with earlier ones", "server.cli.selfcheck:main"),
    "bench": Command("measure speed or quality on this device (from a checkout)", "server.cli.bench:main"),
    "doctor": Command("say what works and what is missing, before serving", "server.cli.doctor:main"),
    "weights": Group("bring, check, look into and convert model files", WEIGHTS),
    "jobs": Command("list and cancel jobs", "server.cli.jobs:main"),
    "usage": Command("show what each key has used, a day", "server.cli.usage:main"),
    "sleep": Command("free the devices' memory until the next request", "server.cli.sleep:sleep"),
    "wake": Command("load again what sleeps", "server.cli.sleep:wake"),
    "keys": Command("make, list, revoke and rotate API keys", "server.cli.keys:main"),
    "cluster": Command("serve from several engines by Ray Serve (see docs/cluster.md)", "server.cli.cluster:main"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` name, by default those of this process. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"srpo {read_version()}")
        return 0
    return run("srpo", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
