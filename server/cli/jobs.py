"""`srpo jobs`: lists and cancels jobs, whether or not the server runs.

It reads and writes the job database itself; a running server notices a cancellation within a second.
"""

import json
from datetime import UTC, datetime

from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.cli.database import RecordsSettings, open_database, print_table
from server.cli.terminal.failure import CommandFailed
from server.cli.terminal.parsing import parse
from server.jobs.models import ACCEPTED, CANCELLED, FAILED, SUCCEEDED, JobRecord
from server.jobs.store import JobStore

HEADINGS = ["job", "state", "accepted", "seconds", "size", "steps", "images"]
STATES = {"unfinished": ACCEPTED, "succeeded": SUCCEEDED, "failed": FAILED, "cancelled": CANCELLED}


class JobsSettings(RecordsSettings):
    """List jobs, newest first; or cancel some. Prompts are not shown."""

    cancel: CliPositionalArg[list[str]] = Field([], description="`cancel ID...` cancels; nothing lists")
    state: str | None = Field(None, description=f"only those that are {', '.join(STATES)}")
    limit: int = Field(20, ge=1, description="how many to list")
    json_: bool = Field(False, alias="json", description="one JSON object a line")


def main(arguments: list[str]) -> None:
    settings = parse(JobsSettings, "jobs", arguments)
    verb, *identities = settings.cancel or ["list"]
    if verb not in ("list", "cancel") or (verb == "cancel") != bool(identities):
        raise CommandFailed("expected cancel ID..., or nothing to list jobs (see srpo jobs --help)")
    if settings.state is not None and settings.state not in STATES:
        raise CommandFailed(f"--state: expected one of {', '.join(STATES)}")
    with open_database(settings) as database:
        if identities:
            cancel_jobs(JobStore(database), identities)
        else:
            list_jobs(JobStore(database), settings)


def cancel_jobs(store: JobStore, identities: list[str]) -> None:
    """Cancel those that there are. Raises `CommandFailed` for the others."""
    problems = []
    for identity in identities:
        if store.cancel(identity):
            print(f"{identity} cancelled")
        elif record := store.find(identity):
            print(f"{identity} had {record.state} before")
        else:
            problems.append(f"there is no job {identity}; `srpo jobs` lists those there are")
    if problems:
        raise CommandFailed(*problems, exit_code=1)


def list_jobs(store: JobStore, settings: JobsSettings) -> None:
    states = (STATES[settings.state],) if settings.state else tuple(STATES.values())
    records = store.page(None, settings.limit, None, states)
    if settings.json_:
        for record in records:
            print(json.dumps(summarize(record)))
    elif records:
        rows = (["-" if value is None else str(value) for value in summarize(record).values()] for record in records)
        print_table([HEADINGS, *rows])
    else:
        print("no jobs")


def summarize(record: JobRecord) -> dict[str, object]:
    """The job as a row of the list; its prompt is left out."""
    fields = record.fields
    size = fields.get("image_size", {"width": 0, "height": 0})
    return {
        "id": record.id,
        "state": next(name for name, state in STATES.items() if state == record.state),
        "created": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds"),
        "seconds": None if record.finished is None else round(record.finished - record.created, 1),
        "size": f"{size['width']}x{size['height']}",
        "steps": fields.get("num_inference_steps"),
        "images": fields.get("num_images"),
    }
