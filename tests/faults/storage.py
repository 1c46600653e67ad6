"""Faults of what the server writes to: a database that another program has locked, a disk that is full."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

from faults.good import Jobs, ask
from faults.outcome import Fault, Server, Tally
from support.ledgers import fill
from support.server import START_LIMIT, LiveServer
from support.waiting import within

PLAIN = Server("plain")
SMALL_DISK = Server("a disk of 32 MB", disk="32m")


@contextmanager
def locked_database(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Another program writes into the job database, and does not come to an end, while jobs do."""
    jobs = Jobs(server, tally, 2)
    with closing(sqlite3.connect(server.data_dir / "jobs.sqlite3", START_LIMIT, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
    jobs.settle()


@contextmanager
def full_disk(server: LiveServer, tally: Tally) -> Iterator[None]:
    """The disk is full before two jobs end, and has room again later."""
    jobs = Jobs(server, tally, 2, steps=50)
    filler = fill(server.data_dir)
    try:
        assert within(START_LIMIT, lambda: not ask(server, "/ready")["ready"])
        tally.figure = f"/ready: {ask(server, '/ready').get('reason', '')[:60]}"
        yield
    finally:
        filler.unlink()
    freed = time.monotonic()
    jobs.settle()
    assert within(START_LIMIT, lambda: ask(server, "/ready")["ready"])
    tally.figure += f"; ready {time.monotonic() - freed:.0f} s after there was room"


FAULTS = (
    Fault("the job database is locked", "32 D4 D5", locked_database, PLAIN),
    Fault("the disk is full", "32 D4", full_disk, SMALL_DISK),
)
