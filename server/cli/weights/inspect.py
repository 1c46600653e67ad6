"""`srpo weights inspect`: what a file or folder of weights contains. Only headers are read."""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.cli.terminal.failure import CommandFailed
from server.cli.terminal.parsing import Arguments, parse
from server.cli.terminal.text import escape
from weights.errors import WeightsError
from weights.formats.inspection import Inspection, inspect

SHOWN = 5  # names of a long list


class InspectSettings(Arguments):
    """Say what a weights file or folder holds: format, types, parameters, and which model it would serve."""

    path: CliPositionalArg[Path] = Field(description="a safetensors or GGUF file, or a diffusers folder")
    json_: bool = Field(False, alias="json", description="print one JSON object")


def main(arguments: list[str]) -> int:
    """Returns exit code 1 where the file can be read and does not fit. Raises `CommandFailed` if it cannot be read."""
    settings = parse(InspectSettings, "weights inspect", arguments)
    try:
        found = inspect(settings.path)
    except (WeightsError, OSError) as error:
        raise CommandFailed(escape(str(error))) from error
    if settings.json_:
        print(json.dumps(asdict(found)))
    else:
        print_inspection(found)
    return 1 if found.problem else 0


def print_inspection(found: Inspection) -> None:
    types = ", ".join(f"{dtype} ({format_count(count)})" for dtype, count in found.dtypes.items())
    rows = {
        "file": f"{found.path} ({found.bytes / 1e9:.2f} GB, {found.tensors} tensors)",
        "format": f"{found.format}: {found.title}",
        "types": types,
        "parameters": f"{format_count(found.parameters)} ({found.parameters:,})",
        "architecture": found.architecture,
        "missing": format_names(found.missing),
        "unexpected": format_names(found.unexpected),
        "beside": f"{found.beside} tensors of other models, which are not read" if found.beside else None,
        "serves": " or ".join(found.models),
        "problem": found.problem,
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(escape(value)))
    Console(highlight=False, soft_wrap=True).print(table)


def format_count(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def format_names(names: tuple[str, ...]) -> str | None:
    if not names:
        return None
    return f"{len(names)}: {', '.join(names[:SHOWN])}" + (" ..." if len(names) > SHOWN else "")
