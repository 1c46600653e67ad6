"""Postgres through psycopg 3, for several servers. Needs the extra `postgres`.

Every wait has an end: for a connection, a lock, a statement, an answer, and a host that is gone without a word. So a
database that is lost is noticed within seconds, and a connection is tried before it is used again.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import sqlalchemy as sa

from server.errors import DatabaseUnavailable, StorageBusy, StorageDamaged, StorageFailure, StorageFull

CONNECT_TIMEOUT = 5  # seconds, for each address of the host
SILENCE = 10  # seconds that a host may leave what was sent to it unconfirmed
INTERVAL = 0.1  # seconds between looks for a signal, as psycopg has it
ANSWER_TIMEOUT = 20.0  # seconds for an answer: more than any statement may take there
SERVER_LIMITS = {  # milliseconds
    "statement_timeout": 15_000,
    "lock_timeout": 10_000,
    "idle_in_transaction_session_timeout": 30_000,  # of a server that was stopped in the middle of a transaction
}
MIGRATION_LOCK = 0x7372706F  # any number, the same in every version
# Codes of errors: https://www.postgresql.org/docs/current/errcodes-appendix.html
LOST = {"08", "57P01", "57P02", "57P03", "57P05", "25006", "25P03", "53300"}  # no connection, shut down, a standby
BUSY = {"40001", "40P01", "55P03", "57014"}
FULL = {"53100", "53200", "53400"}
DAMAGED = {"XX001", "XX002"}
# Of a connection that was refused there is only the text: libpq passes no code on.
REFUSED = (
    "password authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "is not permitted to log in",
)
ABSENT = re.compile(r'(database|role) "[^"]*" does not exist')


def explain_refusal(error: BaseException | None) -> str | None:
    """What is wrong with the setting of a database that answers and lets nobody in; None where it may only be away.

    It is PostgreSQL's own sentence, which names the user and no password.
    """
    text = str(getattr(error, "orig", error))
    said = text.partition("FATAL:")[2].strip().partition("\n")[0] or text.partition("\n")[0]
    return said if any(words in text for words in REFUSED) or ABSENT.search(text) else None


class Postgres:
    """A `Backend`."""

    shared = True

    def options(self) -> dict[str, Any]:
        limits = " ".join(f"-c {name}={value}" for name, value in SERVER_LIMITS.items())
        arguments = {
            "application_name": "srpo",
            "connect_timeout": CONNECT_TIMEOUT,
            "keepalives_idle": SILENCE // 2,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": SILENCE * 1000,
            "options": limits,
        }
        return {"pool_pre_ping": True, "pool_timeout": SILENCE, "connect_args": arguments}

    def prepare(self, engine: sa.Engine) -> None:
        bounded = make_bounded_connection()

        @sa.event.listens_for(engine, "do_connect")
        def connect(_: sa.Dialect, __: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
            return bounded.connect(*arguments, **options)

    def translate(self, error: sa.exc.DBAPIError) -> StorageFailure | None:
        if isinstance(error, sa.exc.DataError):
            return None
        code = getattr(error.orig, "sqlstate", None)
        if code is None or error.connection_invalidated or code[:2] in LOST or code in LOST:
            return DatabaseUnavailable()
        if code in BUSY:
            return StorageBusy()
        if code in FULL:
            return StorageFull()
        return StorageDamaged() if code in DAMAGED else None

    @contextmanager
    def changing_schema(self, connection: sa.Connection) -> Iterator[None]:
        """Statements may take as long as a large table needs; whoever holds a table is waited for no longer than ever.

        Other servers that start wait until it is over.
        """
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.answers_within = inf
        try:
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            connection.execute(sa.text("SET LOCAL lock_timeout TO DEFAULT"))
            yield
        finally:
            driver.answers_within = None

    def check(self, connection: sa.Connection) -> None:
        """Postgres looks after its own files."""

    def shrink(self, connection: sa.Connection) -> None:
        """Postgres does it by itself (autovacuum)."""

    def now(self, clock: Callable[[], float]) -> sa.ColumnElement[float]:  # noqa: ARG002 - clocks of servers differ
        return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Float)


def make_bounded_connection() -> Any:
    """The class of connections on which no answer is waited for without end.

    A host that is frozen still confirms what it gets, and a proxy may have forgotten whom it is for: libpq would wait
    for ever, and with it the thread.
    """
    import psycopg

    class BoundedConnection(psycopg.Connection[Any]):
        answers_within: float | None = None  # seconds; None: `ANSWER_TIMEOUT`

        def wait(self, gen: Any, interval: float = INTERVAL, timeout: float | None = None) -> Any:
            if timeout is None:
                timeout = ANSWER_TIMEOUT if self.answers_within is None else self.answers_within
            try:
                return super().wait(gen, interval, timeout)
            except psycopg.OperationalError:
                if self.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:  # the answer may still come
                    self.close()
                raise

    return BoundedConnection
