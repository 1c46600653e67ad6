"""The command line that all measurements share: a table on the screen, and figures in a JSON file if one is named."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `srpo bench NAME`, with `--json`."""
    parser = argparse.ArgumentParser(
        f"srpo bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return parser


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_json(figures: Any, file: Path | None) -> None:
    """Write the figures, unless no file was named. The file is replaced at once, so a killed run leaves the old one."""
    if file:
        partial = file.with_name(f"{file.name}.new")
        partial.write_text(json.dumps(figures, indent=2) + "\n")
        partial.replace(file)


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`512x512,1440x512` as pairs of width and height in pixels."""
    return [(int(width), int(height)) for width, height in (size.split("x") for size in text.split(","))]
