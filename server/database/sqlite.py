"""SQLite: a file in the data folder, which one server uses at a time.

WAL with `synchronous=FULL`: a commit survives the loss of power.
"""

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from server.errors import StorageBusy, StorageDamaged, StorageFailure, StorageFull

FILE = "jobs.sqlite3"  # in the data folder
BUSY_TIMEOUT = 10.0  # seconds to wait for another program's lock
PRIMARY_CODE = 0xFF  # of a result code (https://www.sqlite.org/rescode.html): the rest says more of the same error
LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
NOT_WRITABLE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
MIN_FREE = 4096  # pages, 16 MiB: less is soon used again


def sqlite_url(folder: Path) -> sa.URL:
    """The address of the database in a data folder."""
    return sa.URL.create("sqlite", database=str(folder / FILE))


class SQLite:
    """A `Backend`."""

    shared = False

    def options(self) -> dict[str, Any]:
        return {}

    def prepare(self, engine: sa.Engine) -> None:
        sa.event.listen(engine, "connect", set_pragmas)

    def translate(self, error: sa.exc.DBAPIError) -> StorageFailure | None:
        code = getattr(error.orig, "sqlite_errorcode", 0) & PRIMARY_CODE
        if isinstance(error, sa.exc.OperationalError) and code in LOCKED:
            return StorageBusy()
        if isinstance(error, sa.exc.OperationalError) and code in NOT_WRITABLE:
            return StorageFull()
        return StorageDamaged()

    def changing_schema(self, connection: sa.Connection) -> AbstractContextManager[None]:  # noqa: ARG002 - a `Backend`
        """The first statement that writes locks the file."""
        return nullcontext()

    def check(self, connection: sa.Connection) -> None:
        if connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok":
            raise StorageDamaged

    def shrink(self, connection: sa.Connection) -> None:
        """Where more than half of the file is free, and more than a little."""
        free, pages = (
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("freelist_count", "page_count")
        )
        if free > max(MIN_FREE, pages / 2):
            connection.exec_driver_sql("VACUUM")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def now(self, clock: Callable[[], float]) -> sa.ColumnElement[float]:
        return sa.literal(clock(), sa.Float)


def set_pragmas(connection: Any, _: object) -> None:
    busy = f"busy_timeout={int(BUSY_TIMEOUT * 1000)}"
    for pragma in (busy, "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")
