"""The database for subcommands that read and write it themselves, whether or not the server runs."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from alembic.util import CommandError
from pydantic import Field

from server.cli.terminal.failure import CommandFailed, format_error
from server.database.database import Database, explain_version, resolve_url
from server.database.postgres import explain_refusal
from server.database.sqlite import FILE
from server.errors import NotFound, StorageFailure
from server.process.data_folder import make_private
from server.settings.storage import DatabaseSettings
from server.settings.types import Folder


class RecordsSettings(DatabaseSettings):
    """Where the server keeps its records."""

    data_dir: Folder = Field(Path("data"), description="the server's folder for images and other state")


@contextmanager
def open_database(settings: RecordsSettings, *, create: bool = False) -> Iterator[Database]:
    """The server's database. Raises `CommandFailed` where it cannot be used, and where what is asked for is not in it.

    `create`: make the database where there is none yet.
    """
    file = settings.data_dir / FILE
    if settings.database_url is None and create:
        try:
            make_private(settings.data_dir)
        except OSError as error:
            raise CommandFailed(f"{format_error(error)}: run it as the server's user (see --data-dir)") from error
    elif settings.database_url is None and not file.exists():
        raise CommandFailed(f"there is no {file}: no server has run there (see --data-dir)")
    with closing(Database(resolve_url(settings.database_url, settings.data_dir))) as database:
        try:
            database.open()
            yield database
        except NotFound as error:
            raise CommandFailed(str(error), exit_code=1) from error
        except CommandError as error:
            raise CommandFailed(f"{database.place} {explain_version(error)}") from error
        except StorageFailure as error:
            if refusal := explain_refusal(error.__cause__):
                correct = "correct SRPO_DATABASE_URL"
                raise CommandFailed(f"{database.place} refuses this command: {refusal}; {correct}") from error
            raise CommandFailed(str(error)) from error


def print_table(rows: list[list[str]]) -> None:
    """Columns as wide as what is in them. Nothing is cut short to fit: an id is there to be copied."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
