"""The database for subcommands that read and write it themselves, whether or not the server runs."""

import sys
from collections.abc import Callable
from pathlib import Path

from alembic.util import CommandError
from pydantic import Field

from server.cli.terminal.parsing import format_error
from server.database.database import Database, explain_version, resolve_url
from server.database.sqlite import FILE
from server.errors import NotFound, StorageFailure
from server.process.data_folder import make_private
from server.settings.storage import DatabaseSettings


class RecordsSettings(DatabaseSettings):
    """Where the server keeps its records."""

    data_dir: Path = Field(Path("data"), description="the server's folder for images and other state")


def with_database(
    command: str, settings: RecordsSettings, action: Callable[[Database], int], *, create: bool = False
) -> int:
    """The exit code of `action` on the server's database; 2, with a line that says why, where that cannot be used.

    `create`: make the database where there is none yet. What is not found in it is 1.
    """
    file = settings.data_dir / FILE
    if settings.database_url is None and create:
        try:
            make_private(settings.data_dir)
        except OSError as error:
            print(
                f"srpo {command}: {format_error(error)}: run it as the server's user (see --data-dir)", file=sys.stderr
            )
            return 2
    elif settings.database_url is None and not file.exists():
        print(f"srpo {command}: there is no {file}: no server has run there (see --data-dir)", file=sys.stderr)
        return 2
    database = Database(resolve_url(settings.database_url, settings.data_dir))
    try:
        database.open()
        return action(database)
    except NotFound as error:
        print(f"srpo {command}: {error}", file=sys.stderr)
        return 1
    except CommandError as error:
        print(f"srpo {command}: {database.place} {explain_version(error)}", file=sys.stderr)
        return 2
    except StorageFailure as error:
        print(f"srpo {command}: {error}", file=sys.stderr)
        return 2
    finally:
        database.close()


def print_table(rows: list[list[str]]) -> None:
    """Columns as wide as what is in them. Nothing is cut short to fit: an id is there to be copied."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
