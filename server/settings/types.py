"""What settings are made of: where they are read, and what the text of one may mean."""

import ipaddress
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic.config import JsonDict
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "SRPO_"  # of every variable
COMMON: JsonDict = {"common": True}  # of a field that most operators set: docs/configuration.md begins with these
DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # in seconds
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def split_list(value: Any) -> Any:
    """Split text at its commas; any other value is returned unchanged."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def split_keys(value: Any) -> Any:
    """As `split_list`, but text must hold something: with no key at all the server would be open."""
    if isinstance(value, str) and value and not split_list(value):
        raise ValueError("it holds no key: the server would be open")
    return split_list(value)


def parse_bytes(value: Any) -> Any:
    """The bytes that text like 16MiB means; any other value is returned unchanged."""
    if isinstance(value, str) and value[-3:] in UNITS:
        number = float(value[:-3])
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not a number of bytes")
        return int(number * UNITS[value[-3:]])
    return value


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_seconds(value: Any) -> Any:
    """The seconds that text like 90s, 15m, 12h or 30d means; any other value is returned unchanged."""
    if not isinstance(value, str):
        return value
    number, unit = (value[:-1], DURATIONS[value[-1]]) if value[-1:] in DURATIONS else (value, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise ValueError(f"{value!r}: expected seconds, or a time such as 15m, 12h or 30d") from None


def describe_choices(names: Mapping[str, str]) -> str:
    """The names in a sentence, each with what it means, if that is said: `black, blur (unrecognizable) or flag`."""
    *first, last = (f"{name} ({meaning})" if meaning else name for name, meaning in names.items())
    return f"{', '.join(first)} or {last}"


def find_unknown_variables(names: Iterable[str], kind: type[BaseSettings]) -> dict[str, str | None]:
    """Those of `names` that begin like a setting's variable and are none of `kind`'s, each with the nearest one."""
    known = {name.upper() for name in kind.model_fields}
    given = {name: name.upper().removeprefix(PREFIX) for name in names if name.upper().startswith(PREFIX)}
    nearest = {name: get_close_matches(rest, known, 1) for name, rest in given.items() if rest not in known}
    return {name: PREFIX + found[0] if found else None for name, found in nearest.items()}


@dataclass(frozen=True)
class Metavar:
    """What a value is called in a command's help, where neither its type nor its setting's name says what to write."""

    text: str


SECONDS = Metavar("SECONDS")
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_list)]
Keys = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_keys)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), SECONDS]
WholeSeconds = Annotated[int, BeforeValidator(parse_seconds), SECONDS]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Metavar("BYTES")]
Port = Annotated[int, Metavar("PORT")]
Folder = Annotated[Path, Metavar("FOLDER")]
Url = Annotated[str, Metavar("URL")]


class EnvironmentSettings(BaseSettings):
    """Settings from `SRPO_*` environment variables, and from flags where a command has them."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,  # a time that does not end cannot be added to a date
        hide_input_in_errors=True,  # it may be a key or a password
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_prefix_target="all",  # SRPO_ also before an alias, such as a flag's short name
    )
