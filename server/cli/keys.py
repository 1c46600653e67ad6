"""`srpo keys`: the API keys of a server, whether or not it runs; a running one notices within seconds.

Without a subcommand it makes a key for the key file (`SRPO_API_KEYS_FILE`), which no database knows.
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import CliPositionalArg, NoDecode

from server.cli.database import RecordsSettings, open_database, print_table
from server.cli.terminal.parsing import Arguments, Command, parse, run
from server.security.key_params import (
    DEFAULT_SCOPES,
    Grace,
    KeyName,
    KeyParams,
    KeyScopes,
    Lifetime,
    RotationParams,
)
from server.security.keys import new_key
from server.security.models import KeyRecord
from server.security.store import KeyStore, describe_key
from server.settings.types import SECONDS, parse_seconds, split_list

COMMANDS: Mapping[str, Command] = {
    "add": Command("make a key with scopes and quotas, kept in the database", "server.cli.keys:add"),
    "list": Command("list the database's keys, never their text", "server.cli.keys:list_keys"),
    "revoke": Command("end a key", "server.cli.keys:revoke"),
    "rotate": Command("give a key another text", "server.cli.keys:rotate"),
    "line": Command("make a key and its line for SRPO_API_KEYS_FILE", "server.cli.keys:print_line"),
}
HEADINGS = ["id", "name", "key begins", "scopes", "made", "ends", "images/day", "at a time", "a minute"]
ADDED = KeyParams.model_fields
INTEGER = re.compile(r"[+-]?\d{1,20}")
ONCE = "give it to the client: it cannot be shown again"


class LineSettings(Arguments):
    """Make an API key. The key is shown once; keep the hash line in the key file."""


def parse_integer(value: Any) -> Any:
    """The integer that text means; any other value is returned unchanged, to be refused by who knows the bounds."""
    return int(value) if isinstance(value, str) and INTEGER.fullmatch(value) else value


class AddSettings(RecordsSettings, KeyParams):
    """Make an API key, kept in the server's database. The key is shown once."""

    name: CliPositionalArg[KeyName] = Field(description=ADDED["name"].description)
    scopes: Annotated[KeyScopes, NoDecode, BeforeValidator(split_list)] = Field(
        DEFAULT_SCOPES, description=ADDED["scopes"].description
    )
    expires_in: Annotated[Lifetime, BeforeValidator(parse_seconds), SECONDS] | None = Field(
        None, validation_alias="expires", description=ADDED["expires_in"].description
    )
    json_: bool = Field(False, alias="json", description="one JSON object")

    _parse_counts = field_validator("images_per_day", "concurrent_requests", "requests_per_minute", mode="before")(
        parse_integer
    )


class ListSettings(RecordsSettings):
    """List the keys in the server's database."""

    json_: bool = Field(False, alias="json", description="one JSON object a line")


class RevokeSettings(RecordsSettings):
    """End a key: it is refused within seconds. Its jobs and its usage stay."""

    id: CliPositionalArg[str] = Field(description="the key's id, or how its text begins")


class RotateSettings(RecordsSettings, RotationParams):
    """Give a key another text, shown once. Its jobs, usage and quotas stay."""

    id: CliPositionalArg[str] = Field(description="the key's id, or how its text begins")
    grace: Annotated[Grace, BeforeValidator(parse_seconds), SECONDS] = Field(
        0.0, description=RotationParams.model_fields["grace"].description
    )
    json_: bool = Field(False, alias="json", description="one JSON object")


def main(arguments: list[str]) -> int:
    return run("srpo keys", COMMANDS, arguments or ["line"])


def print_line(arguments: list[str]) -> None:
    parse(LineSettings, "keys line", arguments)
    key, line = new_key()
    print(f"key (give it to the client):           {key}")
    print(f"line (append it to SRPO_API_KEYS_FILE): {line}")


def add(arguments: list[str]) -> None:
    settings = parse(AddSettings, "keys add", arguments)
    with open_database(settings, create=True) as database:
        key = KeyStore(database).add(settings.name, settings.scopes, settings.end(time.time()), settings.quota)
        show(*key, as_json=settings.json_)


def rotate(arguments: list[str]) -> None:
    settings = parse(RotateSettings, "keys rotate", arguments)
    with open_database(settings) as database:
        show(*KeyStore(database).rotate(settings.id, settings.grace), as_json=settings.json_)


def revoke(arguments: list[str]) -> None:
    settings = parse(RevokeSettings, "keys revoke", arguments)
    with open_database(settings) as database:
        print(f"{KeyStore(database).revoke(settings.id).id} revoked")


def list_keys(arguments: list[str]) -> None:
    settings = parse(ListSettings, "keys list", arguments)
    with open_database(settings) as database:
        records = KeyStore(database).list()
    if settings.json_:
        for record in records:
            print(json.dumps(describe_key(record)))
    elif records:
        print_table([HEADINGS, *(summarize(record) for record in records)])
    else:
        print("no keys")


def show(record: KeyRecord, text: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(describe_key(record) | {"key": text}))
    else:
        print(f"id:  {record.id}\nkey: {text}")
        print(ONCE, file=sys.stderr)


def summarize(record: KeyRecord) -> list[str]:
    """The key as a row of the list."""
    quota = (record.images_per_day, record.concurrent_requests, record.requests_per_minute)
    ends = "revoked" if record.revoked is not None else date_of(record.expires)
    return [
        record.id,
        record.name,
        ", ".join(secret.prefix for secret in record.secrets) or "-",
        ",".join(record.scopes or ()),
        date_of(record.created),
        ends,
        *("-" if limit is None else str(limit) for limit in quota),
    ]


def date_of(moment: float | None) -> str:
    return "-" if moment is None else datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M")
