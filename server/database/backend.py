"""What differs between databases: a class for each kind, with the same methods."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import sqlalchemy as sa

from server.errors import StorageFailure


class Backend(Protocol):
    """One kind of database."""

    shared: bool  # whether several servers may use one at a time

    def options(self) -> dict[str, Any]:
        """What `sqlalchemy.create_engine` is called with."""

    def prepare(self, engine: sa.Engine) -> None:
        """Whatever a new connection needs."""

    def translate(self, error: sa.exc.DBAPIError) -> StorageFailure | None:
        """The database's own error as ours; None where it is a mistake in this program."""

    def changing_schema(self, connection: sa.Connection) -> AbstractContextManager[None]:
        """Let nobody else change the schema until the transaction ends; within it statements take their time."""

    def check(self, connection: sa.Connection) -> None:
        """Raises `StorageDamaged` if what is stored is not sound."""

    def shrink(self, connection: sa.Connection) -> None:
        """Give the disk back what has become free, where that is much. `connection` has no transaction open."""

    def now(self, clock: Callable[[], float]) -> sa.ColumnElement[float]:
        """Seconds since 1970, by the clock that all who use the database share; `clock` is this server's."""
