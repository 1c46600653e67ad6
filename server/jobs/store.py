"""The durable list of jobs: what was accepted, and how it ended. SQLite, one transaction a change.

A row is on disk before its job is acknowledged (WAL with `synchronous=FULL`: a commit survives the loss of power), and
a job ends in one update that only an unfinished row takes: whatever crashes, it ends once.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory

from server.errors import StorageBusy, StorageFull

MIGRATIONS = Path(__file__).parent / "migrations"
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
TOMBSTONE = 30 * 86400.0  # seconds an expired job is still known to have been
ACCEPTED, SUCCEEDED, FAILED, CANCELLED, EXPIRED = "accepted", "succeeded", "failed", "cancelled", "expired"
JOBS = sa.Table("jobs", sa.MetaData(), *(sa.Column(name) for name in (
    "number", "id", "owner", "idempotency_key", "body_hash", "state", "created", "finished", "request", "status",
    "headers", "outcome",
)))  # fmt: skip
SOURCES = sa.Table("sources", sa.MetaData(), sa.Column("id"), sa.Column("pixels"))


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job. `outcome` is the reply's body, or the error's envelope, as JSON text; `finished` and `created` are Unix.

    `request` holds what is needed to do it again: the translated fields with the seed, and how to deliver.
    """

    id: str
    owner: str
    idempotency_key: str | None
    body_hash: str
    request: dict[str, Any] | None
    created: float
    state: str = ACCEPTED
    number: int = 0
    finished: float | None = None
    status: int | None = None
    headers: dict[str, str] | None = None
    outcome: str | None = None


class Ledger:
    """The table, safe to use from several threads.

    Every method raises `StorageFull` where the disk is full or not writable, and `StorageBusy` where another program
    keeps the database locked for longer than `BUSY_TIMEOUT`.
    """

    def __init__(self, file: Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{file}")
        sa.event.listen(self._engine, "connect", set_pragmas)

    def open(self) -> None:
        """Make the table, or bring it up to date."""
        script = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])
        environment = EnvironmentContext(
            Config(), script, fn=lambda revision, _: script._upgrade_revs("head", revision)
        )
        with translated_errors(), self._engine.connect() as connection, environment:
            environment.configure(connection=connection)
            with environment.begin_transaction():
                environment.run_migrations()
            connection.commit()

    def close(self) -> None:
        self._engine.dispose()

    def add(self, record: JobRecord, source: bytes | None = None) -> None:
        """Durable when this returns, and with it the source's pixels."""
        values = {name: getattr(record, name) for name in ("id", "owner", "idempotency_key", "body_hash", "created")}
        row = sa.insert(JOBS).values(**values, state=ACCEPTED, request=json.dumps(record.request))
        if source is None:
            self._write(row)
        else:
            self._write(row, sa.insert(SOURCES).values(id=record.id, pixels=source))

    def source(self, identity: str) -> bytes:
        """The source's pixels of an unfinished job; empty if it has none."""
        with self._connection() as connection:
            return connection.scalar(sa.select(SOURCES.c.pixels).where(SOURCES.c.id == identity)) or b""

    def end(
        self, identity: str, state: str, status: int, headers: dict[str, str], outcome: str, *, free_key: bool = False
    ) -> bool:
        """End an unfinished job; False if it had ended before. `free_key`: its idempotency key may be used again."""
        values: dict[str, Any] = {"state": state, "finished": time.time(), "status": status, "outcome": outcome}
        values["headers"] = json.dumps(headers)
        if free_key:
            values["idempotency_key"] = None
        update = sa.update(JOBS).where(JOBS.c.id == identity, JOBS.c.state == ACCEPTED).values(values)
        return self._write(update, sa.delete(SOURCES).where(SOURCES.c.id == identity)) > 0

    def find(self, identity: str) -> JobRecord | None:
        return next(iter(self._read(sa.select(JOBS).where(JOBS.c.id == identity))), None)

    def find_key(self, owner: str, key: str) -> JobRecord | None:
        query = sa.select(JOBS).where(JOBS.c.owner == owner, JOBS.c.idempotency_key == key, JOBS.c.state != EXPIRED)
        return next(iter(self._read(query)), None)

    def unfinished(self) -> list[JobRecord]:
        """In the order in which they were accepted."""
        return self._read(sa.select(JOBS).where(JOBS.c.state == ACCEPTED).order_by(JOBS.c.number))

    def cancelled_among(self, identities: list[str]) -> set[str]:
        """Those that have been cancelled from outside this process."""
        query = sa.select(JOBS.c.id).where(JOBS.c.state == CANCELLED, JOBS.c.id.in_(identities))
        with self._connection() as connection:
            return set(connection.scalars(query))

    def page(self, owner: str | None, limit: int, before: int | None, states: tuple[str, ...]) -> list[JobRecord]:
        """Newest first. `owner` None: everybody's."""
        query = sa.select(JOBS).where(JOBS.c.state.in_(states)).order_by(JOBS.c.number.desc()).limit(limit)
        if owner is not None:
            query = query.where(JOBS.c.owner == owner)
        if before is not None:
            query = query.where(JOBS.c.number < before)
        return self._read(query)

    def sweep(self, expire: float) -> None:
        """Forget what finished `expire` seconds ago, but for its id; later that too."""
        now = time.time()
        gone = {
            "state": EXPIRED,
            "request": None,
            "outcome": None,
            "headers": None,
            "idempotency_key": None,
            "body_hash": "",
        }
        old = JOBS.c.finished < now - expire
        self._write(sa.update(JOBS).where(old, JOBS.c.state != EXPIRED).values(gone))
        self._write(sa.delete(JOBS).where(JOBS.c.finished < now - expire - TOMBSTONE))

    def _read(self, query: sa.Select[Any]) -> list[JobRecord]:
        with self._connection() as connection:
            return [entry_of(row) for row in connection.execute(query).mappings()]

    def _write(self, change: sa.UpdateBase, *more: sa.UpdateBase) -> int:
        """Carry out all of it or nothing; the number of rows that the first one changed."""
        with self._connection() as connection:
            changed = connection.execute(change).rowcount
            for further in more:
                connection.execute(further)
            return changed

    @contextmanager
    def _connection(self) -> Iterator[sa.Connection]:
        """One transaction."""
        with translated_errors(), self._engine.begin() as connection:
            yield connection


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
        raise


def entry_of(row: sa.RowMapping) -> JobRecord:
    parsed = {name: json.loads(row[name]) if row[name] else None for name in ("request", "headers")}
    return JobRecord(**{**row, **parsed})


def set_pragmas(connection: Any, _: object) -> None:
    busy = f"busy_timeout={int(BUSY_TIMEOUT * 1000)}"
    for pragma in (busy, "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")
