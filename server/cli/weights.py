"""`srpo weights`: the commands about model files. One row each."""

from collections.abc import Mapping

from server.cli.commands import Command, run

COMMANDS: Mapping[str, Command] = {
    "pull": Command("bring a model's published files, verified", "server.cli.pull:pull_files"),
    "verify": Command("compare pulled files with their manifest", "server.cli.pull:verify"),
    "inspect": Command("say what a file or folder holds, from its headers", "server.cli.inspect:main"),
    "convert": Command("write a transformer in bf16, fp8 or 4-bit", "server.cli.convert:main"),
}


def main(arguments: list[str]) -> int:
    return run("srpo weights", COMMANDS, arguments)
