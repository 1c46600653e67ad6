"""One database, by its URL: opened and brought up to date by Alembic, used in transactions, closed."""

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.orm import Session

from server.database import sqlite
from server.errors import StorageDamaged

MIGRATIONS = "server.database:migrations"  # package and folder, so that it is found in a wheel too


class Database:
    """The database, safe to use from several threads. Nothing is opened before it is used.

    Every method raises `StorageFull` where the disk is full or not writable, and `StorageBusy` where another program
    keeps the database locked for longer than `sqlite.BUSY_TIMEOUT`; `StorageDamaged` where the file is not a sound
    database.
    """

    def __init__(self, url: sa.URL) -> None:
        self.url = url
        self._engine = sa.create_engine(url)
        self._current = False  # brought up to date by this process
        sa.event.listen(self._engine, "connect", sqlite.set_pragmas)

    def open(self) -> None:
        """Make the tables, or bring those of an earlier version up to date. Again: nothing to do."""
        if self._current:
            return
        config = Config()
        config.set_main_option("script_location", MIGRATIONS)
        with translated_errors(), self._engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        self._current = True

    def check(self) -> None:
        """Raises `StorageDamaged` if the file is not sound."""
        with self.connection() as connection:
            sqlite.check(connection)

    def shrink(self) -> None:
        """Give the disk back what has become free, where that is much."""
        with self.connection() as connection:
            sqlite.shrink(connection.execution_options(isolation_level="AUTOCOMMIT"))

    def close(self) -> None:
        """Close its connections. It can be opened again, with another file in the place of the first."""
        self._engine.dispose()
        self._current = False

    @contextmanager
    def connection(self) -> Iterator[sa.Connection]:
        """For what is no transaction."""
        with translated_errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """All of it happens or nothing. Records stay readable afterwards."""
        with translated_errors(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session


@contextmanager
def translated_errors() -> Iterator[None]:
    """The database's errors as ours. A violated constraint passes as it is."""
    try:
        yield
    except sa.exc.OperationalError as error:
        raise sqlite.error_of(error) from error
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DatabaseError as error:
        raise StorageDamaged from error
