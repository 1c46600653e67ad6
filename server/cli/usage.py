"""`srpo usage`: what each key has used, a day, read from the database, whether or not the server runs."""

import json
import sys
from typing import Annotated

from pydantic import Field, field_validator

from server.cli.database import RecordsSettings, open_database, print_table
from server.cli.terminal.failure import CommandFailed
from server.cli.terminal.parsing import parse
from server.errors import NotFound
from server.security.store import KeyStore
from server.settings.types import Metavar
from server.usage.ledger import UsageLedger, choose_days
from server.usage.report import COLUMNS, describe_usage, format_csv, parse_day

Day = Annotated[str, Metavar("DAY")]


class UsageSettings(RecordsSettings):
    """Show what each key has used, a row a day: of requests that ended with images. Days are UTC's."""

    since: Day | None = Field(None, description="the first day, as 2026-11-01; none: 30 days ago")
    until: Day | None = Field(None, description="the last day, as 2026-11-30; none: today")
    key: str | None = Field(None, description="only this key, by its id as shown")
    csv: bool = Field(False, description="comma-separated values, with a head line")
    json_: bool = Field(False, alias="json", description="one JSON object a line")

    @field_validator("since", "until")
    @classmethod
    def _check_day(cls, value: str | None) -> str | None:
        try:
            return None if value is None else parse_day(value)
        except ValueError:
            raise ValueError("expected a day such as 2026-11-26") from None


def main(arguments: list[str]) -> None:
    settings = parse(UsageSettings, "usage", arguments)
    if settings.since and settings.until and settings.until < settings.since:
        raise CommandFailed(f"--until {settings.until} is before --since {settings.since}")
    since, until = choose_days(settings.since, settings.until)
    with open_database(settings) as database:
        names = {record.id: record.name for record in KeyStore(database).list()}
        records = UsageLedger(database).report(since, until, settings.key)
        if settings.key is not None and not records and settings.key not in names:
            raise NotFound(f"There is no key {settings.key}, and no usage of one. `srpo keys list` shows the ids.")
        rows = [describe_usage(record, names) for record in records]
        if settings.csv:
            sys.stdout.write(format_csv(rows))
        elif settings.json_:
            for row in rows:
                print(json.dumps(row))
        elif rows:
            print_table([list(COLUMNS), *([str(value) for value in row.values()] for row in rows)])
        else:
            print(f"no usage from {since} to {until}")
