"""A data folder with damaged files: one line that names the file, or the file moved aside."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest
from support.jobs import record
from support.ledgers import job_store, locked

from server.__main__ import main as srpo
from server.database.database import Database
from server.database.sqlite import sqlite_url
from server.start_check import NotNow, check_data_folder


def check(folder: Path, damaged: Literal["refuse", "move"]) -> None:
    """As a start does it."""
    database = Database(sqlite_url(folder))
    try:
        check_data_folder(folder, damaged, database)
    finally:
        database.close()


def garbage(folder: Path) -> Path:
    file = folder / "jobs.sqlite3"
    file.write_bytes(b"this is no database " * 1000)
    return file


def truncated(folder: Path) -> Path:
    with job_store(folder) as store:
        for number in range(50):
            store.add(record(f"job_{number}"), bytes(10_000))
    file = folder / "jobs.sqlite3"
    file.write_bytes(file.read_bytes()[:20_000])
    return file


def broken_tuning(folder: Path) -> Path:
    file = folder / "engine.json"
    file.write_text('{"cut of')
    return file


@pytest.mark.parametrize("damage", [garbage, truncated, broken_tuning])
def test_a_damaged_file_is_named_in_one_line_or_moved_aside(tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    file = damage(tmp_path)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=file.name) as refused:
        check(tmp_path, "refuse")
    assert "\n" not in str(refused.value)
    assert file.read_bytes() == before
    check(tmp_path, "move")
    assert file.with_name(f"{file.name}.damaged-1").read_bytes() == before
    check(tmp_path, "refuse")


def test_one_damaged_row_does_not_hide_the_others(tmp_path: Path) -> None:
    with job_store(tmp_path) as store:
        store.add(record("job_bad"))
        store.add(record("job_good"))
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as database, database:
            database.execute("UPDATE jobs SET request = '{\"cut of' WHERE id = 'job_bad'")
        check(tmp_path, "refuse")
        assert [(job.id, job.request is None) for job in store.unfinished()] == [("job_bad", True), ("job_good", False)]


def test_the_database_of_a_later_version_is_never_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as database:
        database.execute("CREATE TABLE alembic_version (version_num TEXT)")
        database.execute("INSERT INTO alembic_version VALUES ('9999')")
        database.commit()
    with pytest.raises(OSError, match=r"another version.*put a backup"):
        check(tmp_path, "move")
    assert not list(tmp_path.glob("*damaged*"))
    assert srpo(["jobs", "--data-dir", str(tmp_path)]) == 2
    assert "put a backup" in capsys.readouterr().err


def test_a_locked_database_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, "refuse")
    monkeypatch.setattr("server.database.sqlite.BUSY_TIMEOUT", 0.01)
    with locked(tmp_path / "jobs.sqlite3"):
        check(tmp_path, "move")
    assert not list(tmp_path.glob("*damaged*"))


def test_a_database_that_cannot_be_opened_is_a_reason_to_try_later(tmp_path: Path) -> None:
    check(tmp_path, "refuse")
    (tmp_path / "jobs.sqlite3").unlink()
    (tmp_path / "jobs.sqlite3").mkdir()  # SQLite cannot open it, as where nothing can be written
    with pytest.raises(NotNow, match="cannot be written"):
        check(tmp_path, "move")
