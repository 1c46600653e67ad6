"""The `srpo` command itself, as it is installed."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from server.__main__ import COMMANDS, WEIGHTS, main
from server.cli.keys import COMMANDS as KEYS

SRPO = Path(sys.executable).parent / "srpo"
GROUPS = {"bench": (), "keys": KEYS, "weights": WEIGHTS}
WITH_FLAGS = [
    *((name,) for name in COMMANDS if name not in GROUPS),
    *((name, below) for name, group in GROUPS.items() for below in group),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SRPO, *arguments], capture_output=True, text=True, check=False)


def test_it_says_its_version_and_its_commands() -> None:
    assert run("--version").stdout == f"srpo {version('srpo-server')}\n"
    usage = run().stdout
    assert usage == run("--help").stdout
    assert all(f"  {name} " in usage for name in COMMANDS)


@pytest.mark.parametrize("command", WITH_FLAGS, ids=" ".join)
def test_help_says_what_to_write_and_names_no_type_of_python(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    told = capsys.readouterr().out
    assert not re.findall(r"-[a-z]+ +(?:str|int|float|bool|Path|SecretStr|list|tuple)\b", told)
    assert not re.findall(r"default: (?:None|True|False|\()", told)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("serve", "--step-timeout SECONDS"),
        ("serve", "--data-dir FOLDER"),
        ("serve", "--metrics-port PORT"),
        ("serve", "--devices DEVICE[,...]"),
        ("serve", "--model-aliases NAME=MODEL[,...]"),
        ("serve", "--queue-size NUMBER"),
        ("generate", "--enable-safety-checker true|false"),
        ("keys add", "--expires SECONDS"),
        ("keys revoke", "ID"),
        ("weights convert", "--to {bf16,fp8,q4}"),
    ],
)
def test_help_names_a_value_by_its_unit_or_choices(
    command: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert f"{shown}\n" in capsys.readouterr().out.replace("  ", "\n")


def test_an_unknown_command_is_an_error_with_the_known_ones() -> None:
    ended = run("sreve")
    assert ended.returncode == 2
    assert "there is no command 'sreve'" in ended.stderr
    assert "serve the HTTP API" in ended.stderr
