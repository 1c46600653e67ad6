"""Requests in the API's own fields, as `srpo generate` reads them: one JSON object a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.translation.aliases import translate
from server.translation.model_names import IMAGE_TO_IMAGE


class CannotGenerate(Exception):
    """Nothing can be drawn as the command stands; the message tells the person who typed it why."""


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a file. `number` counts requests from 1; `fault` says why there are no `fields`."""

    number: int
    fields: dict[str, Any]
    fault: str | None = None


def read_lines(file: Path) -> Iterator[Line]:
    """The requests of a file, one after the other, so that it may be larger than the memory. Raises `OSError`."""
    number = 0
    with file.open("rb") as opened:
        for place, text in enumerate(opened, 1):
            if not text.strip():
                continue
            number += 1
            try:
                fields = json.loads(text)
            except ValueError as error:
                yield Line(number, {}, f"line {place}: not JSON: {error}")
            else:
                if isinstance(fields, dict):
                    yield Line(number, fields)
                else:
                    yield Line(number, {}, f"line {place}: expected a JSON object")


def has_source_image(line: dict[str, Any]) -> bool:
    return "image" in line or "image_url" in line


def to_native(line: dict[str, Any]) -> dict[str, Any]:
    """A line in the API's native fields, and `image`, which names a local file."""
    native = translate({**line, "model": IMAGE_TO_IMAGE if has_source_image(line) else "", "image": None}).native
    del native["model"]
    return native | ({"image": line["image"]} if "image" in line else {})
