"""`srpo weights`: the commands about model files. One row each."""

from collections.abc import Mapping

from server.commands import Command, run

COMMANDS: Mapping[str, Command] = {
    "pull": Command("bring a model's published files, verified", "server.pull_cli:pull_files"),
    "verify": Command("compare pulled files with their manifest", "server.pull_cli:verify"),
    "inspect": Command("say what a file or folder holds, from its headers", "server.inspect_cli:main"),
    "convert": Command("write a transformer in bf16, fp8 or 4-bit", "server.convert_cli:main"),
}


def main(arguments: list[str]) -> int:
    return run("srpo weights", COMMANDS, arguments)
