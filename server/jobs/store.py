"""The durable list of jobs: what was accepted, and how it ended. SQLite, one transaction a change.

A row is on disk before its job is acknowledged (WAL with `synchronous=FULL`: a commit survives the loss of power), and
a job ends in one update that only an unfinished row takes: whatever crashes, it ends once.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.orm import Session, defer

from server.errors import StorageBusy, StorageDamaged, StorageFull
from server.jobs.models import ACCEPTED, CANCELLED, EXPIRED, JobRecord, SourcePicture

FILE = "jobs.sqlite3"  # in the data folder
MIGRATIONS = "server.jobs:migrations"  # package and folder, so that it is found in a wheel too
BUSY_TIMEOUT = 10.0  # seconds to wait for another program's lock
PRIMARY_CODE = 0xFF  # of a result code: the rest says more of the same error
LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
NOT_WRITABLE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
MIN_FREE = 4096  # pages, 16 MiB: less is soon used again
TOMBSTONE = 30 * 86400.0  # seconds for which an expired job is still known to have been


class JobStore:
    """The job database, safe to use from several threads.

    Every method raises `StorageFull` where the disk is full or not writable, and `StorageBusy` where another program
    keeps the database locked for longer than `BUSY_TIMEOUT`; `StorageDamaged` where the file is not a sound database.
    """

    def __init__(self, file: Path, now: Callable[[], float] = time.time) -> None:
        """`now`: the clock by which jobs age, in seconds since 1970."""
        self._now = now
        self._engine = sa.create_engine(f"sqlite:///{file}")
        sa.event.listen(self._engine, "connect", set_pragmas)

    def open(self) -> None:
        """Make the tables, or bring those of an earlier version up to date."""
        config = Config()
        config.set_main_option("script_location", MIGRATIONS)
        with translated_errors(), self._engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def check(self) -> None:
        """Raises `StorageDamaged` if the file is not sound."""
        with translated_errors(), self._engine.connect() as connection:
            if connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() != "ok":
                raise StorageDamaged

    def close(self) -> None:
        self._engine.dispose()

    def add(self, record: JobRecord, source: bytes | None = None) -> None:
        """Durable when this returns, and with it the source's pixels."""
        with self._transaction() as session:
            session.add(record)
            if source is not None:
                session.add(SourcePicture(record.id, source))

    def source(self, identity: str) -> bytes:
        """The source's pixels of an unfinished job; empty if it has none."""
        with self._transaction() as session:
            return session.scalar(sa.select(SourcePicture.pixels).where(SourcePicture.id == identity)) or b""

    def end(
        self, identity: str, state: str, status: int, headers: dict[str, str], outcome: str, *, free_key: bool = False
    ) -> bool:
        """End an unfinished job; False if it had ended before. `free_key`: its idempotency key may be used again."""
        ending: dict[str, Any] = {
            "state": state,
            "finished": self._now(),
            "status": status,
            "headers": headers,
            "outcome": outcome,
        }
        if free_key:
            ending["idempotency_key"] = None
        unfinished = (JobRecord.id == identity, JobRecord.state == ACCEPTED)
        with self._transaction() as session:
            changed = session.connection().execute(sa.update(JobRecord).where(*unfinished).values(ending)).rowcount
            session.execute(sa.delete(SourcePicture).where(SourcePicture.id == identity))
        return changed > 0

    def find(self, identity: str) -> JobRecord | None:
        return next(iter(self._read(sa.select(JobRecord).where(JobRecord.id == identity))), None)

    def find_key(self, owner: str, key: str) -> JobRecord | None:
        """The job that an owner's idempotency key belongs to."""
        query = sa.select(JobRecord).where(
            JobRecord.owner == owner, JobRecord.idempotency_key == key, JobRecord.state != EXPIRED
        )
        return next(iter(self._read(query)), None)

    def unfinished(self) -> list[JobRecord]:
        """In the order in which they were accepted."""
        return self._read(sa.select(JobRecord).where(JobRecord.state == ACCEPTED).order_by(JobRecord.number))

    def cancelled_among(self, identities: list[str]) -> set[str]:
        """Those that have been cancelled from outside this process."""
        query = sa.select(JobRecord.id).where(JobRecord.state == CANCELLED, JobRecord.id.in_(identities))
        with self._transaction() as session:
            return set(session.scalars(query))

    def page(self, owner: str | None, limit: int, before: int | None, states: tuple[str, ...]) -> list[JobRecord]:
        """Newest first, without outcomes. `owner` None: everybody's. `before`: only those with a lower `number`."""
        query = sa.select(JobRecord).where(JobRecord.state.in_(states)).order_by(JobRecord.number.desc()).limit(limit)
        query = query.options(defer(JobRecord.outcome))  # an outcome may hold pictures
        if owner is not None:
            query = query.where(JobRecord.owner == owner)
        if before is not None:
            query = query.where(JobRecord.number < before)
        return self._read(query)

    def sweep(self, expire: float) -> None:
        """Delete what is known of jobs that finished `expire` seconds ago, except their ids; later those too."""
        now = self._now()
        cleared = {
            "state": EXPIRED,
            "request": None,
            "outcome": None,
            "headers": None,
            "idempotency_key": None,
            "body_hash": "",
        }
        old = (JobRecord.finished < now - expire, JobRecord.state != EXPIRED)
        with self._transaction() as session:
            session.execute(sa.update(JobRecord).where(*old).values(cleared))
        with self._transaction() as session:
            session.execute(sa.delete(JobRecord).where(JobRecord.finished < now - expire - TOMBSTONE))

    def shrink(self) -> None:
        """Give the disk back what is free in the file, where that is more than half of it and more than a little."""
        with translated_errors(), self._engine.connect() as plain:
            connection = plain.execution_options(isolation_level="AUTOCOMMIT")
            free, pages = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in ("freelist_count", "page_count")
            )
            if free > max(MIN_FREE, pages / 2):
                connection.exec_driver_sql("VACUUM")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def _read(self, query: sa.Select[Any]) -> list[JobRecord]:
        with self._transaction() as session:
            return list(session.scalars(query))

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        """All of it happens or nothing. Records stay readable afterwards."""
        with translated_errors(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session


@contextmanager
def translated_errors() -> Iterator[None]:
    """SQLite's errors as ours, by its result code (https://www.sqlite.org/rescode.html). Others pass as they are."""
    try:
        yield
    except sa.exc.OperationalError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0) & PRIMARY_CODE
        if code in LOCKED:
            raise StorageBusy from error
        if code in NOT_WRITABLE:
            raise StorageFull from error
        raise StorageDamaged from error
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DatabaseError as error:
        raise StorageDamaged from error


def set_pragmas(connection: Any, _: object) -> None:
    busy = f"busy_timeout={int(BUSY_TIMEOUT * 1000)}"
    for pragma in (busy, "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")
