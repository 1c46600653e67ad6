"""The database and the jobs in it: kept, forgotten, brought up to date, and refused in our words where it fails."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.orm.exc import DetachedInstanceError
from support.jobs import record
from support.ledgers import job_store, opened
from support.server import START_LIMIT

from server.database.base import Base
from server.errors import StorageFull
from server.jobs.models import SUCCEEDED
from server.jobs.store import JobStore


def test_a_job_ends_once_and_is_forgotten_in_two_steps(tmp_path: Path) -> None:
    with opened(tmp_path) as database:
        database.open()  # up to date: nothing to do
        store = JobStore(database)
        store.add(record("a"))
        assert store.end("a", SUCCEEDED, 201, {}, "first")
        assert not store.end("a", "cancelled", 499, {}, "second")
        found = store.find("a")
        assert found is not None
        assert (found.state, found.outcome) == (SUCCEEDED, "first")
        store.sweep(expire=-1)
        found = store.find("a")
        assert found is not None
        assert (found.state, found.request, found.outcome) == ("expired", None, None)
    assert b"secret" not in (tmp_path / "jobs.sqlite3").read_bytes()


def test_a_page_of_jobs_reads_no_outcomes_and_expired_ones_leave_the_disk(tmp_path: Path) -> None:
    """An outcome may hold pictures: a page of 100 read 100 MB of them, and the file never shrank."""
    file = tmp_path / "jobs.sqlite3"
    with opened(tmp_path) as database:
        store = JobStore(database)
        for number in range(24):
            store.add(record(f"job_{number}"))
            store.end(f"job_{number}", SUCCEEDED, 201, {}, "x" * 2**20)
        (newest, *_) = store.page(None, 9, None, (SUCCEEDED,))
        with pytest.raises(DetachedInstanceError):
            _ = newest.outcome
        database.shrink()
        assert file.stat().st_size > 20 * 2**20
        store.sweep(expire=-1)
        database.shrink()
        assert file.stat().st_size < 2**20
        found = store.find("job_3")
        assert found is not None
        assert found.state == "expired"


def test_the_sweep_reads_no_job_that_it_leaves_as_it_is(tmp_path: Path) -> None:
    """It runs each minute, and what is known of expired jobs stays for a month."""
    statements: list[tuple[str, object]] = []
    with opened(tmp_path) as database, database.connection() as connection:

        @sa.event.listens_for(connection.engine, "before_cursor_execute")
        def note(_: object, __: object, statement: str, parameters: object, *___: object) -> None:
            if "jobs" in statement:
                statements.append((statement, parameters))

        JobStore(database).sweep(expire=1.0)
        sa.event.remove(connection.engine, "before_cursor_execute", note)
        plans = [
            row[-1]
            for statement, parameters in statements
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
        ]
    reads = [plan for plan in plans if plan.split()[1] == "jobs"]
    assert len(reads) == 2
    assert all("jobs_by_end (state=? AND finished<?)" in plan for plan in reads), plans


def test_the_migrations_make_the_tables_that_the_models_describe(tmp_path: Path) -> None:
    with opened(tmp_path) as database, database.connection() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


FIRST_VERSION = """
CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO alembic_version VALUES ('0001');
CREATE TABLE jobs (
    number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, id VARCHAR(64) NOT NULL, owner VARCHAR(64) NOT NULL,
    idempotency_key VARCHAR(255), body_hash VARCHAR(64) NOT NULL, state VARCHAR(16) NOT NULL, created FLOAT NOT NULL,
    finished FLOAT, request TEXT, status INTEGER, headers TEXT, outcome TEXT,
    UNIQUE (id), CONSTRAINT one_job_a_key UNIQUE (owner, idempotency_key)
);
CREATE INDEX jobs_by_state ON jobs (state, number);
INSERT INTO jobs VALUES (
    7, 'job_old', '', NULL, 'hash', 'succeeded', 1.0, 2.0, '{"base_url": "x"}', 201, '{"a": "b"}', '{}'
);
"""


def test_a_database_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as old:
        old.executescript(FIRST_VERSION)
    with job_store(tmp_path) as store:
        (found,) = store.page(None, 9, None, (SUCCEEDED,))
        assert (found.number, found.id, found.request, found.headers) == (7, "job_old", {"base_url": "x"}, {"a": "b"})
        store.add(record("job_new"), b"pixels")
        assert store.source("job_new") == b"pixels"


def test_a_revision_is_made_as_alembic_makes_it(tmp_path: Path) -> None:
    """The command in `migrations/env.py`; without `revision`, so that nothing is written into the source."""
    command = [sys.executable, "-m", "alembic", "-x", f"url=sqlite:///{tmp_path}/jobs.sqlite3"]
    root = Path(__file__).parent.parent
    for verb in (["upgrade", "head"], ["check"]):
        done = subprocess.run([*command, *verb], cwd=root, capture_output=True, text=True, timeout=START_LIMIT)
        assert done.returncode == 0, done.stderr
    assert "No new upgrade operations detected" in done.stdout


@pytest.mark.parametrize("pragma", ["max_page_count=1", "query_only=ON"])
def test_a_database_that_cannot_grow_is_told_as_a_full_disk(tmp_path: Path, pragma: str) -> None:
    with opened(tmp_path) as database:
        sa.event.listen(database._engine, "begin", lambda connection: connection.exec_driver_sql(f"PRAGMA {pragma}"))
        with pytest.raises(StorageFull):
            JobStore(database).add(record("a"), bytes(2**20))
