"""The `srpo` command itself, as it is installed."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from server.__main__ import COMMANDS

SRPO = Path(sys.executable).parent / "srpo"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SRPO, *arguments], capture_output=True, text=True, check=False)


def test_it_says_its_version_and_its_commands() -> None:
    assert run("--version").stdout == f"srpo {version('srpo-server')}\n"
    usage = run().stdout
    assert usage == run("--help").stdout
    assert all(f"  {name} " in usage for name in COMMANDS)


def test_an_unknown_command_is_an_error_with_the_known_ones() -> None:
    ended = run("sreve")
    assert ended.returncode == 2
    assert "there is no command 'sreve'" in ended.stderr
    assert "serve the HTTP API" in ended.stderr
