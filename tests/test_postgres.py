"""Jobs in a real Postgres: leases, migrations, two versions at a time, and what happens when it is lost."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from pydantic import SecretStr
from support.command_line import srpo
from support.jobs import record
from support.ledgers import opened
from support.postgres import PASSWORD, Postgres
from support.tcp_proxy import proxy_to
from support.waiting import LIMIT, within

from server.database.base import Base
from server.database.database import MIGRATIONS, Database, resolve_url
from server.errors import DatabaseUnavailable, StorageBusy
from server.jobs.leases import JobLeases
from server.jobs.models import ACCEPTED, SUCCEEDED, JobRecord
from server.jobs.store import JobStore, KeyTaken
from server.settings.server import Settings
from server.start_check import check_database


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Of an empty database, as the setting gives it."""
    setting = Settings(database_url=SecretStr(postgres.create_database())).database_url
    assert setting is not None
    return setting.get_secret_value()


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with opened(url) as database:
        yield database


def keyed(name: str, key: str) -> JobRecord:
    return JobRecord(name, "owner", key, "hash", {"spoken": {"native": {"prompt": "\0 and \U0001f600"}}}, created=1.0)


def leased(name: str, leases: JobLeases) -> JobRecord:
    job = record(name)
    leases.grant(job)
    return job


def test_jobs_are_kept_as_in_a_file(database: Database) -> None:
    store = JobStore(database)
    database.check()
    store.add(keyed("a", "key"), b"\0pixels")
    with pytest.raises(KeyTaken):
        store.add(keyed("b", "key"))
    found = store.find_key("owner", "key")
    assert found is not None
    assert found.request == {"spoken": {"native": {"prompt": "\0 and \U0001f600"}}}
    assert store.source("a") == b"\0pixels"
    assert store.end("a", SUCCEEDED, 201, {"a": "b"}, "first")
    assert not store.end("a", SUCCEEDED, 201, {}, "second")
    (found,) = store.page("owner", 9, None, (SUCCEEDED,))
    assert (found.headers, store.source("a")) == ({"a": "b"}, b"")
    store.sweep(expire=-1)
    database.shrink()
    found = store.find("a")
    assert found is not None
    assert (found.state, found.outcome, found.idempotency_key) == ("expired", None, None)


def test_a_connection_that_is_in_use_when_the_database_closes_is_closed_after_it(url: str) -> None:
    """As that of a thread which a server that stops does not wait for."""
    clients = "datname = current_database() AND backend_type = 'client backend'"
    count = sa.text(f"SELECT count(*) FROM pg_stat_activity WHERE {clients}")
    with opened(url) as other, other.connection() as watching:
        watching.execution_options(isolation_level="AUTOCOMMIT")  # a transaction would see what its first look saw
        database = Database(sa.make_url(url))
        with database.transaction() as session:
            assert session.execute(count).scalar() == 2
            database.close()
        assert within(LIMIT, lambda: watching.execute(count).scalar() == 1)


def test_the_migrations_make_the_tables_that_the_models_describe(database: Database) -> None:
    with database.connection() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_many_servers_start_on_an_empty_database_at_once(url: str) -> None:

    def start(_: int) -> bool:
        with opened(url) as database:
            return database.shared

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(start, range(6)))


def test_an_upgrade_may_take_longer_than_a_statement_may(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large table could never be brought up to date. Afterwards the limits hold again."""
    upgrade = command.upgrade

    def upgrade_slowly(config: Config, revision: str) -> None:
        config.attributes["connection"].execute(sa.text("SELECT pg_sleep(4.5)"))
        upgrade(config, revision)

    limits = {"statement_timeout": 2000, "lock_timeout": 1500}
    monkeypatch.setattr("server.database.postgres.SERVER_LIMITS", limits)
    monkeypatch.setattr("server.database.postgres.ANSWER_TIMEOUT", 4.0)
    monkeypatch.setattr(command, "upgrade", upgrade_slowly)
    with ThreadPoolExecutor(2) as threads, ExitStack() as stack:  # the second one waits for the first
        first, _ = threads.map(lambda _: stack.enter_context(opened(url)), range(2))
        with pytest.raises(StorageBusy), first.transaction() as session:
            session.execute(sa.text("SELECT pg_sleep(60)"))


def test_each_orphan_is_taken_over_by_one_server_alone(database: Database) -> None:
    store, dead = JobStore(database), JobLeases(database, 0.0)
    for number in range(40):
        store.add(leased(f"job_{number}", dead))

    def take(leases: JobLeases) -> list[str]:
        taken = []
        while records := leases.take_over(3):
            taken += [job.id for job in records]
        return taken

    with ThreadPoolExecutor(4) as threads:
        names = [name for names in threads.map(take, [JobLeases(database, 60.0) for _ in range(4)]) for name in names]
    assert sorted(names) == sorted(f"job_{number}" for number in range(40))


def test_who_has_lost_a_lease_can_neither_renew_it_nor_end_the_job(database: Database) -> None:
    store, slow, quick = JobStore(database), JobLeases(database, 0.0), JobLeases(database, 60.0)
    store.add(leased("a", slow), b"pixels")
    (taken,) = quick.take_over(None)
    assert (taken.attempt, slow.renew(["a"]), quick.renew(["a"])) == (1, {"a"}, set())
    assert not store.end("a", SUCCEEDED, 201, {}, "slow", attempt=0)
    assert store.source("a") == b"pixels"  # still needed
    slow.tell({"a": {"stage": "denoise"}})
    assert store.unfinished_among(["a"]) == {"a": None}
    quick.tell({"a": {"stage": "text"}})
    assert store.unfinished_among(["a", "b"]) == {"a": {"stage": "text"}}
    assert store.end("a", SUCCEEDED, 201, {}, "quick", attempt=1)
    found = store.find("a")
    assert found is not None
    assert found.outcome == "quick"
    assert slow.take_over(None) == []


def test_a_lease_that_is_renewed_or_released_is_held_or_free(database: Database) -> None:
    store, holder, other = JobStore(database), JobLeases(database, 60.0), JobLeases(database, 60.0)
    store.add(leased("a", holder))
    assert other.take_over(None) == []
    holder.release()
    assert [job.id for job in other.take_over(None)] == ["a"]


def test_a_server_that_was_too_slow_to_renew_does_not_take_over_what_it_still_does(database: Database) -> None:
    store, slow = JobStore(database), JobLeases(database, 0.0)
    for name in ("a", "b"):
        store.add(leased(name, slow))
    assert [job.id for job in slow.take_over(None, ["a"])] == ["b"]


def test_however_many_jobs_expire_at_once_they_are_swept_a_few_at_a_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One statement for a large backlog ran into the time limit, was rolled back, and was begun again for ever."""
    many = random.randint(25, 60)
    monkeypatch.setattr("server.jobs.store.SWEPT_AT_ONCE", 10)
    store = JobStore(database)
    for number in range(many):
        store.add(record(f"job_{number}"))
        store.end(f"job_{number}", SUCCEEDED, 201, {}, "x")
    with database.transaction() as session:  # a statement may only change so many
        session.execute(sa.text(REFUSE.format(limit=10)))
    with database.transaction() as other:
        other.execute(sa.select(JobRecord.id).where(JobRecord.id == "job_7").with_for_update())
        store.sweep(expire=-1)
        assert store.count_by_state() == {"expired": many - 1, SUCCEEDED: 1}
    store.sweep(expire=-1)
    assert store.count_by_state() == {"expired": many}
    with monkeypatch.context() as later:
        later.setattr("server.jobs.store.TOMBSTONE", 0.0)
        store.sweep(expire=-1)
    assert store.count_by_state() == {}


REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF (SELECT count(*) FROM changed) > {limit} THEN RAISE 'too many' USING ERRCODE = 'query_canceled'; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER refuse AFTER UPDATE ON jobs REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION refuse();
"""


# --- two versions at a time ------------------------------------------------------------------------------------------


def migrate(url: str, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_what_the_version_before_writes_stays_valid_while_it_still_runs(url: str) -> None:
    """An upgrade while servers of the version before are running: their statements, on the tables as they know them."""
    migrate(url, "0002")
    engine = sa.create_engine(url)
    tables = sa.MetaData()
    tables.reflect(engine)
    jobs = tables.tables["jobs"]
    row = {"owner": "", "body_hash": "h", "state": ACCEPTED, "created": 1.0, "request": "{}"}
    with engine.begin() as old:
        old.execute(sa.insert(jobs).values(id="before", **row))
    with opened(url) as database:
        with engine.begin() as old:
            old.execute(sa.insert(jobs).values(id="after", **row))
            old.execute(sa.insert(jobs).values(id="ended", **row))
        with engine.begin() as old:
            ending = {"state": SUCCEEDED, "finished": 2.0, "status": 201, "headers": "{}", "outcome": "{}"}
            old.execute(sa.update(jobs).where(jobs.c.id == "ended").values(ending))
        store = JobStore(database)
        assert [job.id for job in store.unfinished()] == ["before", "after"]
        taken = JobLeases(database, 60.0).take_over(None)
        assert [(job.id, job.attempt) for job in taken] == [("before", 1), ("after", 1)]
        with engine.begin() as old:  # the version before reads what the new one has written
            assert old.execute(sa.select(jobs.c.state).order_by(jobs.c.number)).scalars().all() == [
                ACCEPTED,
                ACCEPTED,
                SUCCEEDED,
            ]
    engine.dispose()


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_lock_that_is_not_given_back_is_told_as_busy(database: Database) -> None:
    store = JobStore(database)
    store.add(record("a"))

    def read_soon() -> None:
        with database.transaction() as session:
            session.execute(sa.text("SET LOCAL lock_timeout = '50ms'"))
            session.scalars(sa.select(JobRecord)).all()

    with database.transaction() as other:
        other.execute(sa.text("LOCK TABLE jobs"))
        with pytest.raises(StorageBusy):
            read_soon()


def test_a_lost_database_is_told_as_such_and_found_again(postgres: Postgres, database: Database) -> None:
    store = JobStore(database)
    store.add(record("a"))
    postgres.kill()
    try:
        for _ in range(2):  # on the connection that was open, and on a new one
            with pytest.raises(DatabaseUnavailable) as lost:
                store.find("a")
            assert PASSWORD not in f"{lost.value} {lost.value.__cause__}"
    finally:
        postgres.start()
    assert store.find("a") is not None


def test_a_database_that_does_not_answer_is_told_as_such_and_found_again(
    postgres: Postgres, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network takes what is sent and forgets it: on the open connection, and on a new one."""
    monkeypatch.setattr("server.database.postgres.CONNECT_TIMEOUT", 2)  # libpq knows nothing shorter
    with proxy_to(postgres.port) as network, opened(url.replace(str(postgres.port), str(network.port))) as database:
        store = JobStore(database)
        store.add(record("a"))
        with monkeypatch.context() as hasty:
            hasty.setattr("server.database.postgres.ANSWER_TIMEOUT", 0.3)
            network.mode = "hold"
            for _ in range(2):
                with pytest.raises(DatabaseUnavailable):
                    store.find("a")
        network.mode = "pass"
        assert store.find("a") is not None


@pytest.mark.parametrize(
    ("statement", "value"), [("SELECT :it FROM nowhere", "a canary"), ("SELECT :it", "a canary\0")]
)
def test_an_error_of_the_database_quotes_no_value(database: Database, statement: str, value: str) -> None:
    """Values are prompts and addresses, and the log has the traceback. One that Postgres cannot hold is no outage."""
    with pytest.raises(sa.exc.DBAPIError) as raised, database.transaction() as session:
        session.execute(sa.text(statement), {"it": value})
    assert "canary" not in str(raised.value)


def test_nothing_that_names_the_database_shows_its_password(url: str) -> None:
    settings = Settings(database_url=SecretStr(url))
    database = Database(resolve_url(settings.database_url, Path()))
    assert (
        PASSWORD not in f"{settings} {settings!r} {database.place} {settings.model_dump()} {settings.model_dump_json()}"
    )
    with pytest.raises(ValueError) as refused:
        Settings.model_validate({"database_url": url.replace("postgresql", "mysql")})
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((PASSWORD, "not-the-Password"), 'password authentication failed for user "srpo"'),
        (("/test_", "/absent_"), 'database "absent_'),
    ],
)
def test_a_wrong_password_or_name_is_an_error_of_the_settings(
    url: str, wrong: tuple[str, str], said: str, tmp_path: Path
) -> None:
    """Starting again later does not help, and commands say the same."""
    wrong_url = url.replace(*wrong)
    with pytest.raises(OSError, match=said) as refused:
        check_database(Database(resolve_url(SecretStr(wrong_url), tmp_path)))
    listing = srpo("keys", "list", SRPO_DATABASE_URL=wrong_url)
    assert listing.returncode == 2
    for told in (str(refused.value), listing.stderr.strip()):
        assert said in told
        assert "SRPO_DATABASE_URL" in told
        assert PASSWORD not in told
        assert "not-the-Password" not in told
        assert "\n" not in told
