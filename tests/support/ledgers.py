"""Job databases of one's own, and what goes wrong with one by real means: another program's lock, a full disk."""

import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path

import sqlalchemy as sa

from server.database.base import TABLES
from server.database.database import Database
from server.database.sqlite import sqlite_url
from server.jobs.store import JobStore

for module in TABLES:  # so that a test which compares all tables with the migrations has all of them
    import_module(module)


@contextmanager
def opened(where: Path | str) -> Iterator[Database]:
    """A database, brought up to date: the one in a data folder, or that of a URL."""
    database = Database(sqlite_url(where) if isinstance(where, Path) else sa.make_url(where))
    try:
        database.open()
        yield database
    finally:
        database.close()


@contextmanager
def job_store(where: Path | str) -> Iterator[JobStore]:
    """The jobs in a database, as for `opened`."""
    with opened(where) as database:
        yield JobStore(database)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Another program that writes to the database and takes its time."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


def small_disk(folder: Path, size: str, *command: str) -> list[str]:
    """A command that runs `command` with a disk of its own, of `size`, at `folder`."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(folder))}"
    return ["unshare", "-rm", "sh", "-c", f"{mount} && exec {shlex.join(command)}"]


def disks_permitted(folder: Path) -> bool:
    try:
        return subprocess.run(small_disk(folder, "1m", sys.executable, "-c", ""), capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def fill(disk: Path) -> Path:
    """A file that takes all that is left of the disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler
