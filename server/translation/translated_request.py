"""A request in native fields, and what its client is told of it: how its reply looks, and which fields were ignored."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self
from urllib.parse import quote

EVENTS = "image_generation"  # what the names of a stream's events begin with
MAX_LISTED, MAX_NAME = 20, 64


@dataclass
class TranslatedRequest:
    """A body in native fields, how its images are to be returned, and the names of fields that were ignored."""

    native: dict[str, Any]
    response_format: str | None = None  # url, b64_json or both; None: url
    stream: bool = False
    partial_images: int = 0
    events: str = EVENTS
    detailed: bool = False  # the reply is to have what those of OpenAI's gpt-image models have
    ignored: list[str] = field(default_factory=list)  # the first of them, encoded, each once
    unlisted: int = 0  # how many more were ignored: there may be thousands, and this is kept as long as its job

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """As it was written down, maybe by a newer version: what is not known here is left out."""
        return cls(**{known.name: data[known.name] for known in fields(cls) if known.name in data})

    def ignore(self, names: Iterable[str]) -> None:
        """Say of these fields that they were ignored."""
        cut = [name for name in dict.fromkeys(name[:MAX_NAME] for name in names) if name]
        listed = list(dict.fromkeys([*self.ignored, *map(encode_name, cut[:MAX_LISTED])]))
        self.ignored = listed[:MAX_LISTED]
        self.unlisted += len(cut[MAX_LISTED:]) + len(listed[MAX_LISTED:])

    def format_ignored(self) -> str:
        """The value of `x-ignored-fields`: at most 20 names, and how many more there are."""
        return ", ".join([*self.ignored, *([f"+{self.unlisted}"] if self.unlisted else [])])


def encode_name(name: str) -> str:
    """A field's name, percent-encoded outside `A-Za-z0-9_.-`, in at most 64 characters.

    It is cut before it is encoded too: it may be as long as a body.
    """
    quoted = quote(name[:MAX_NAME], safe="").replace("~", "%7E")
    return re.sub("%.?$", "", quoted[:MAX_NAME])  # no half of an escape
