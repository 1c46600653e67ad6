"""What is SQLite's own: how a file is opened, what its errors mean, and how its room is given back.

WAL with `synchronous=FULL`: a commit survives the loss of power. Of the primary result codes
(https://www.sqlite.org/rescode.html) the first byte is compared: the rest says more of the same error.
"""

import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from server.errors import ServerError, StorageBusy, StorageDamaged, StorageFull

FILE = "jobs.sqlite3"  # in the data folder
BUSY_TIMEOUT = 10.0  # seconds to wait for another program's lock
PRIMARY_CODE = 0xFF
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


def set_pragmas(connection: Any, _: object) -> None:
    busy = f"busy_timeout={int(BUSY_TIMEOUT * 1000)}"
    for pragma in (busy, "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def error_of(error: sa.exc.OperationalError) -> ServerError:
    """Ours, by SQLite's result code."""
    code = getattr(error.orig, "sqlite_errorcode", 0) & PRIMARY_CODE
    if code in LOCKED:
        return StorageBusy()
    return StorageFull() if code in NOT_WRITABLE else StorageDamaged()


def check(connection: sa.Connection) -> None:
    """Raises `StorageDamaged` if the file is not sound."""
    if connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok":
        raise StorageDamaged


def shrink(connection: sa.Connection) -> None:
    """Give the disk back what is free in the file, where that is more than half of it and more than a little.

    `connection` has no transaction open.
    """
    free, pages = (
        connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("freelist_count", "page_count")
    )
    if free > max(MIN_FREE, pages / 2):
        connection.exec_driver_sql("VACUUM")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
