"""What a flag's value is called in a command's help: a word that says what to write, not Python's name of its type."""

import re
from argparse import Action, ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from pipelines.fields import Choice
from server.settings.types import Metavar

NO_DEFAULT = re.compile(r" ?\(default: (?:None|True|False|\(\))\)")
TUPLE_DEFAULT = re.compile(r"\(default: \(([^()]*)\)\)")


def add_argument_of(kind: type[BaseSettings]) -> Callable[..., Action]:
    """`ArgumentParser.add_argument`, for the flags of `kind` that pydantic-settings declares."""

    fields = {spelling: item for item in kind.model_fields.items() for spelling in spellings_of(*item)}

    def add_argument(parser: ArgumentParser, *names: str, **options: Any) -> Action:
        item = fields.get(options.get("dest", ""))  # a positional argument has none, and is called by its name
        if item is not None and not str(options.get("metavar", "{")).startswith("{"):
            options["metavar"] = choose_metavar(*item)
        if "help" in options:
            options["help"] = tidy_default(options["help"])
        return parser.add_argument(*names, **options)

    return add_argument


def spellings_of(name: str, field: FieldInfo) -> set[str]:
    alias = field.validation_alias
    return {name, *map(str, alias.choices if isinstance(alias, AliasChoices) else [alias or name])}


def choose_metavar(name: str, field: FieldInfo) -> str:
    """What the field declares, else what its type says to write, else the last word of its name."""
    parts = parts_of(field)
    for part in parts:
        if isinstance(part, Metavar):
            return part.text
        if isinstance(part, Choice):
            return "{" + ",".join(part.names) + "}"
    if Path in parts:
        return "FILE"
    if int in parts or float in parts:
        return "NUMBER"
    word = name.rpartition("_")[2].upper()
    return f"{word.removesuffix('S')}[,...]" if any(get_origin(part) is tuple for part in parts) else word


def parts_of(field: FieldInfo) -> list[Any]:
    """The field's types and metadata, those of an optional one's members too."""
    members = (field.annotation, *get_args(field.annotation))
    return [*field.metadata, *members, *(part for member in members for part in get_args(member))]


def tidy_default(text: str) -> str:
    """Help without Python's spelling of defaults; none is said by the description."""
    return TUPLE_DEFAULT.sub(
        lambda found: f"(default: {found[1].replace(chr(39), '').strip(', ').replace(', ', ',')})",
        NO_DEFAULT.sub("", text),
    )
