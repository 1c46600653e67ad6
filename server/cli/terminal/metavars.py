"""What a flag's value is called in a command's help: a word that says what to write, not Python's name of its type."""

import re
from argparse import Action, ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import AliasChoices, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from pipelines.fields import Choice
from server.settings.types import parse_bytes, parse_seconds

SECONDS = "SECONDS"
BY_NAME = {  # the last word of a setting's name
    "cache": "FOLDER",
    "dir": "FOLDER",
    "endpoint": "URL",
    "hook": "URL",
    "url": "URL",
    "host": "ADDRESS",
    "hosts": "HOST[,...]",
    "ips": "ADDRESS[,...]",
    "port": "PORT",
    "key": "KEY",
    "keys": "KEY[,...]",
    "secrets": "SECRET[,...]",
    "origins": "URL[,...]",
    "since": "DAY",
    "until": "DAY",
    "size": "SIZE",
    "images": "NUMBER",
    "scale": "NUMBER",
    "seed": "NUMBER",
    "steps": "NUMBER",
    "strength": "NUMBER",
    "delay": SECONDS,
    "expire": SECONDS,
    "grace": SECONDS,
    "lease": SECONDS,
    "lifetime": SECONDS,
    "timeout": SECONDS,
}
POSITIONAL = {"identity": "ID"}
OF_NUMBERS = (SECONDS, "PORT")
NO_DEFAULT = re.compile(r" ?\(default: (?:None|True|False|\(\))\)")
TUPLE_DEFAULT = re.compile(r"\(default: \(([^()]*)\)\)")


def add_argument_of(kind: type[BaseSettings]) -> Callable[..., Action]:
    """`ArgumentParser.add_argument`, for the flags of `kind` that pydantic-settings declares."""

    fields = {spelling: item for item in kind.model_fields.items() for spelling in spellings_of(*item)}

    def add_argument(parser: ArgumentParser, *names: str, **options: Any) -> Action:
        name, field = fields.get(str(options.get("dest", names[0])), ("", None))
        positional = not names[0].startswith("-")
        if positional and name in POSITIONAL:
            options["metavar"] = POSITIONAL[name]
        elif field is not None and not positional and not str(options.get("metavar", "{")).startswith("{"):
            options["metavar"] = find_metavar(name, field)
        if "help" in options:
            options["help"] = tidy_default(options["help"])
        return parser.add_argument(*names, **options)

    return add_argument


def spellings_of(name: str, field: FieldInfo) -> set[str]:
    alias = field.validation_alias
    return {name, *map(str, alias.choices if isinstance(alias, AliasChoices) else [alias or name])}


def find_metavar(name: str, field: FieldInfo) -> str:
    """By the setting's name where that says more than its type, else by its type."""
    word = name.rpartition("_")[2]
    kinds = [field.annotation, *get_args(field.annotation), *parts_of(field)]
    validators = {part.func for part in parts_of(field) if isinstance(part, BeforeValidator)}
    for choice in parts_of(field):
        if isinstance(choice, Choice):
            return "{" + ",".join(choice.names) + "}"
    if parse_seconds in validators:
        return SECONDS
    if parse_bytes in validators:
        return "BYTES"
    if Path in kinds:
        return "FOLDER" if BY_NAME.get(word) == "FOLDER" else "FILE"
    if name.startswith("enable_"):
        return "true|false"
    if int in kinds or float in kinds:
        return BY_NAME[word] if BY_NAME.get(word) in OF_NUMBERS else "NUMBER"
    if word in BY_NAME:
        return BY_NAME[word]
    return "NAME[,...]" if tuple in {getattr(one, "__origin__", one) for one in (*kinds, *parts_of(field))} else "NAME"


def parts_of(field: FieldInfo) -> list[Any]:
    """What an annotation is made of: its own metadata, and that of an optional one's members."""
    inner = [part for member in get_args(field.annotation) for part in (*get_args(member), *metadata_of(member))]
    return [*field.metadata, *inner]


def metadata_of(member: Any) -> tuple[Any, ...]:
    return tuple(getattr(member, "__metadata__", ()))


def tidy_default(text: str) -> str:
    """Help without Python's spelling of defaults; none is said by the description."""
    return TUPLE_DEFAULT.sub(
        lambda found: f"(default: {found[1].replace(chr(39), '').strip(', ').replace(', ', ',')})",
        NO_DEFAULT.sub("", text),
    )
