"""Usage as people and their programs read it: a row a day and key, in JSON or CSV."""

import csv
import io
from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any

from server.schema import CREDITS_PER_USD
from server.usage.models import HASHED, UsageRecord

MEGAPIXEL = 2**20
COLUMNS = ("day", "key", "name", "requests", "images", "megapixels", "device_seconds", "credits", "usd")


def describe_usage(record: UsageRecord, names: Mapping[str, str]) -> dict[str, Any]:
    """One row. `names` are those of keys, by their ids; a key of the settings is told by the start of its hash."""
    owner = record.owner
    known = owner in names or not owner
    return {
        "day": record.day,
        "key": owner if known else f"{HASHED}{owner[:12]}",
        "name": names.get(owner, "from the settings" if owner else "without a key"),
        "requests": record.requests,
        "images": record.images,
        "megapixels": round(record.pixels / MEGAPIXEL, 4),
        "device_seconds": round(record.device_seconds, 3),
        "credits": record.credits,
        "usd": record.credits / CREDITS_PER_USD,
    }


def format_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """With a head line. A name that a spreadsheet would take for a formula is kept text by an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        name = str(row["name"])
        writer.writerow({**row, "name": f"'{name}" if name.startswith(("=", "+", "-", "@", "\t")) else name})
    return text.getvalue()


def parse_day(value: str) -> str:
    """A day of UTC, as `2026-11-26`. Raises `ValueError`."""
    return date.fromisoformat(value).isoformat()
