"""One database, by its URL: opened and brought up to date by Alembic, used in transactions, closed."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from pydantic import SecretStr
from sqlalchemy.orm import Session

from server.database.backend import Backend
from server.database.postgres import Postgres
from server.database.sqlite import SQLite, sqlite_url
from server.errors import DatabaseUnavailable
from server.extras import missing_extra

MIGRATIONS = "server.database:migrations"  # package and folder, so that it is found in a wheel too
BACKENDS: Mapping[str, Backend] = {"sqlite": SQLite(), "postgresql": Postgres()}
INSTALL = missing_extra("Postgres", "postgres")


def explain_version(error: CommandError) -> str:
    """What is wrong with a database whose tables this version does not know, and what to do."""
    advice = "start that version, or put a backup from before it in its place (docs/upkeep.md)"
    return f"was written by another version of this server ({error}): {advice}"


class Database:
    """The database, safe to use from several threads. Nothing is opened before it is used.

    Every method raises a `StorageFailure` where the database fails: `DatabaseUnavailable` where it cannot be reached,
    `StorageBusy` where another program keeps it locked, `StorageFull` where its disk is full or not writable, and
    `StorageDamaged` where it is not a sound database.
    """

    def __init__(self, url: sa.URL, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since 1970, by which records age where no other server uses the database.

        Raises `ValueError` where the URL's database cannot be used.
        """
        self._url = url
        self._clock = clock
        self._backend = BACKENDS[url.get_backend_name()]
        self._current = False  # brought up to date by this process
        try:
            self._engine = sa.create_engine(url, hide_parameters=True, **self._backend.options())
        except ModuleNotFoundError:
            raise ValueError(INSTALL) from None
        self._backend.prepare(self._engine)

    @property
    def shared(self) -> bool:
        """Whether other servers may use it at the same time."""
        return self._backend.shared

    @property
    def place(self) -> str:
        """Where it is, for people: a file, or a host and a name."""
        url = self._url
        return f"{url.host or 'this machine'}/{url.database}" if self.shared else str(url.database)

    def open(self) -> None:
        """Make the tables, or bring those of an earlier version up to date. Again: nothing to do."""
        if self._current:
            return
        config = Config()
        config.set_main_option("script_location", MIGRATIONS)
        with self._translated_errors(), self._engine.begin() as connection:
            config.attributes["connection"] = connection
            with self._backend.changing_schema(connection):
                command.upgrade(config, "head")
        self._current = True

    def check(self) -> None:
        """Raises `StorageDamaged` if what is stored is not sound."""
        with self.connection() as connection:
            self._backend.check(connection)

    def ask(self) -> None:
        """Raises `DatabaseUnavailable` where it does not answer."""
        with self.connection() as connection:
            connection.execute(sa.select(1))

    def shrink(self) -> None:
        """Give the disk back what has become free, where that is much."""
        with self.connection() as connection:
            self._backend.shrink(connection.execution_options(isolation_level="AUTOCOMMIT"))

    def close(self) -> None:
        """Close its connections. It can be opened again, with another file in the place of the first."""
        self._engine.dispose()
        self._current = False

    def now(self) -> sa.ColumnElement[float]:
        """Seconds since 1970, as part of a statement, by the clock that all who use the database share."""
        return self._backend.now(self._clock)

    @contextmanager
    def connection(self) -> Iterator[sa.Connection]:
        """For what is no transaction."""
        with self._translated_errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """All of it happens or nothing. Records stay readable afterwards."""
        with self._translated_errors(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """The database's errors as ours. A violated constraint passes as it is."""
        pool = self._engine.pool
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        except sa.exc.DBAPIError as error:
            if ours := self._backend.translate(error):
                raise ours from error
            raise
        except sa.exc.TimeoutError as error:  # all connections are in use
            raise DatabaseUnavailable from error
        finally:
            if pool is not self._engine.pool:  # closed meanwhile, by another thread: so is what came back to it since
                pool.dispose()


def resolve_url(url: SecretStr | None, folder: Path) -> sa.URL:
    """The database that the setting names; without it the file in the data folder."""
    return sqlite_url(folder) if url is None else sa.make_url(url.get_secret_value())
