"""Compare two versions of this server from outside, before and after a change that must not be seen there.

    python -m bench.behaviour record --srpo OLD/.venv/bin/srpo --out old.json
    python -m bench.behaviour record --srpo NEW/.venv/bin/srpo --out new.json
    python -m bench.behaviour compare old.json new.json

For refactors and for upgrades of libraries. `record` uses only what users have: the `srpo` command, HTTP on a loopback
port, and files of the data folder. It runs some servers with the tiny model and flux/sketch, and writes down replies,
digests of images, help texts, messages, and the layout of the data folder, without what differs at every run. `compare`
prints each difference, and exits with 1 if there is one.

    python -m bench.behaviour old-data make --srpo OLD/.venv/bin/srpo FOLDER
    python -m bench.behaviour old-data open --srpo NEW/.venv/bin/srpo FOLDER --out new-data.json

`make` leaves a data folder in which a server was killed at work; `open` serves a copy of it, and records what becomes
of its images, jobs and `engine.json`. Let the old version open it too, and compare the two recordings.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from bench.behaviour import limits, scenarios
from bench.behaviour.server import Recording

SHOWN = 300  # characters of a value
SCENARIOS: Mapping[str, Callable[[Recording], None]] = {
    "commands": scenarios.run_commands,
    "sketch": scenarios.serve_sketch,
    "tiny": scenarios.serve_tiny,
    "keys": scenarios.serve_with_keys,
    "limits": limits.serve_within_limits,
    "early": limits.stop_early,
}


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """One line for each place at which two JSON values differ; members of objects in another order differ too."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            place = f"{path} > {name}" if path else name
            if name not in new:
                yield f"{place}: missing, was {shorten(old[name])}"
            elif name not in old:
                yield f"{place}: new, is {shorten(new[name])}"
            else:
                yield from differences(old[name], new[name], place)
        if path and old.keys() == new.keys() and list(old) != list(new):
            yield f"{path}: order was {', '.join(old)}; is {', '.join(new)}"
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path} > {index}")
    elif old != new:
        yield f"{path}: was {shorten(old)}\n{' ' * len(path)}   is {shorten(new)}"


def shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text)} characters)"


def record(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="behaviour-") as folder:
        recording = Recording(arguments.srpo.absolute(), Path(folder))
        for name, scenario in SCENARIOS.items():
            if not arguments.only or name in arguments.only:
                print(f"{name} ...", file=sys.stderr, flush=True)
                try:
                    scenario(recording)
                except (httpx.HTTPError, OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    recording.add(f"{name}: broken off", f"{type(error).__name__}: {error}")
    write(recording, arguments.out)
    return 0


def make_old_data(arguments: argparse.Namespace) -> int:
    arguments.folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="behaviour-") as folder:
        scenarios.leave_data(Recording(arguments.srpo.absolute(), Path(folder)), arguments.folder.absolute())
    return 0


def open_old_data(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="behaviour-") as folder:
        recording = Recording(arguments.srpo.absolute(), Path(folder))
        copy = shutil.copytree(arguments.folder, recording.folder / "data")
        scenarios.open_data(recording, copy)
    write(recording, arguments.out)
    return 0


def write(recording: Recording, file: Path) -> None:
    file.write_text(json.dumps(recording.records, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(recording.records)} recordings in {file}", file=sys.stderr)


def compare(arguments: argparse.Namespace) -> int:
    old, new = (json.loads(file.read_text()) for file in (arguments.old, arguments.new))
    found = sorted(differences(old, new))
    print("\n".join(found) or f"{len(old)} recordings are equal")
    return 1 if found else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("record", help="record what a version does")
    command.set_defaults(run=record)
    add_recording(command)
    command.add_argument("--only", nargs="+", choices=SCENARIOS, help="some of the scenarios")
    command = commands.add_parser("compare", help="print the differences of two recordings")
    command.set_defaults(run=compare)
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    data = commands.add_parser("old-data", help="make or open a data folder with unfinished jobs")
    verbs = data.add_subparsers(required=True)
    command = verbs.add_parser("make", help="make the folder")
    command.set_defaults(run=make_old_data)
    add_recording(command, out=False)
    command.add_argument("folder", type=Path)
    command = verbs.add_parser("open", help="serve a copy of the folder, and record what becomes of it")
    command.set_defaults(run=open_old_data)
    add_recording(command)
    command.add_argument("folder", type=Path)
    parsed = parser.parse_args(arguments)
    code: int = parsed.run(parsed)
    return code


def add_recording(command: argparse.ArgumentParser, *, out: bool = True) -> None:
    command.add_argument("--srpo", type=Path, required=True, help="the `srpo` executable of the version")
    if out:
        command.add_argument("--out", type=Path, required=True, help="the JSON file to write")


if __name__ == "__main__":
    sys.exit(main())
