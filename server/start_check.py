"""Whether the files in a data folder can be used, looked at before anything is loaded.

What cannot be read is named in one line, or moved aside where the operator wants that; it is never deleted.
"""

from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

import structlog
from alembic.util import CommandError

from pipelines.optimize import tuning_cache
from pipelines.optimize.tuning_cache import TuningCache
from server.database.database import Database, explain_version
from server.database.postgres import explain_refusal
from server.database.sqlite import FILE
from server.errors import DatabaseUnavailable, StorageBusy, StorageDamaged, StorageFull
from server.jobs.store import JobStore
from weights.durable_file import sync_folder

BESIDE = ("", "-wal", "-shm")  # what belongs to a SQLite file
log = structlog.get_logger("srpo")


class NotNow(Exception):
    """The data folder cannot be used at this moment; a later start may go well."""


def check_data_folder(folder: Path, damaged: Literal["refuse", "move"], database: Database) -> None:
    """Open the folder's database, which stays open, and read its tuning cache.

    Raises `ValueError` for a file that cannot be read, unless it is to be moved; `NotNow` where the disk is full or the
    database is locked; `OSError` for the database of a later version, which is sound and not moved, and for one that
    refuses this server.
    """
    jobs, tuning = folder / FILE, folder / tuning_cache.NAME
    check_jobs = partial(check_database, database)
    for check, file, sidecars in ((check_jobs, jobs, BESIDE), (partial(check_tuning, tuning), tuning, ("",))):
        try:
            check()
        except ValueError as error:
            if damaged == "refuse" or not file.exists():
                raise ValueError(f"{error}. To begin with a new one: --damaged-data move") from error
            moved = move_aside(file, sidecars)
            log.warning("damaged_file_moved", file=str(file), to=str(moved), reason=str(error))
            check()


def check_database(database: Database) -> None:
    place = database.place
    try:
        database.open()
        database.check()
        JobStore(database).unfinished()
    except StorageDamaged as error:
        database.close()
        raise ValueError(f"{place} is damaged: {error.__cause__ or error}".partition("\n")[0]) from error
    except CommandError as error:
        raise OSError(f"{place} {explain_version(error)}") from error
    except StorageFull as error:
        raise NotNow(f"{place} cannot be written: its disk is full or not writable") from error
    except StorageBusy as error:
        raise NotNow(f"{place} is locked by another program") from error
    except DatabaseUnavailable as error:
        if refusal := explain_refusal(error.__cause__):
            raise OSError(f"the database {place} refuses this server: {refusal}. Correct SRPO_DATABASE_URL") from error
        raise NotNow(
            f"the database {place} cannot be reached: {error.__cause__ or error}".partition("\n")[0]
        ) from error


def check_tuning(file: Path) -> None:
    TuningCache(file).section("")


def move_aside(file: Path, sidecars: tuple[str, ...]) -> Path:
    """Rename a file, and what belongs to it, to a name that is free."""
    target = next(path for number in count(1) if not (path := file.with_name(f"{file.name}.damaged-{number}")).exists())
    for suffix in sidecars:
        if (part := file.with_name(file.name + suffix)).exists():
            part.rename(target.with_name(target.name + suffix))
    sync_folder(file.parent)
    return target
