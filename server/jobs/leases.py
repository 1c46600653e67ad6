"""Which of the servers that share a database carries a job out.

A job is leased by the server that accepts it. The lease is renewed while that server lives; where it has run out, the
first other one to look takes the job over, and counts that in the job's `attempt`. Whoever was the owner before can
then no longer end the job: only the newest attempt does. All times are the database's.

A database that no other server uses has no leases to wait for: a start takes over all that is unfinished.
"""

import secrets
import socket
from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa

from server.database.database import Database
from server.jobs.models import ACCEPTED, JobRecord


class JobLeases:
    """The leases of one server, which is called `replica`. `seconds` is how long one is valid.

    Safe to use from several threads. Every method raises what `Database` does.
    """

    def __init__(self, database: Database, seconds: float) -> None:
        self.replica = f"{socket.gethostname()[:50]}-{secrets.token_hex(4)}"
        self.seconds = seconds
        self._database = database

    def grant(self, record: JobRecord) -> None:
        """Make a job that is about to be written down this server's."""
        record.replica, record.lease_until = self.replica, self._end()

    def take_over(self, limit: int | None, besides: Collection[str] = ()) -> list[JobRecord]:
        """At most `limit` unfinished jobs whose server is gone, in the order of acceptance; from now on they are ours.

        No two servers get the same one, and none waits for another. `besides` are jobs that this server carries out: it
        may have been too slow to renew their leases, and is not gone for that.
        """
        orphaned = [JobRecord.state == ACCEPTED]
        if self._database.shared:  # a version without leases writes none
            lease_until = sa.func.coalesce(JobRecord.lease_until, JobRecord.created + self.seconds)
            orphaned += [lease_until < self._database.now(), JobRecord.id.not_in(besides)]
        query = sa.select(JobRecord).where(*orphaned).order_by(JobRecord.number).limit(limit)
        with self._database.transaction() as session:
            records = list(session.scalars(query.with_for_update(skip_locked=True)))
            for record in records:
                record.attempt += 1
                self.grant(record)
        return records

    def renew(self, identities: Collection[str]) -> set[str]:
        """Renew the leases of these jobs. Returns those that are no longer unfinished and ours."""
        renewal = sa.update(JobRecord).where(*self._held(), JobRecord.id.in_(identities))
        with self._database.transaction() as session:
            held = session.scalars(renewal.values(lease_until=self._end()).returning(JobRecord.id))
            return set(identities) - set(held)

    def release(self) -> None:
        """Let others take over at once what is unfinished here."""
        with self._database.transaction() as session:
            session.execute(sa.update(JobRecord).where(*self._held()).values(lease_until=0.0))

    def tell(self, progress: Mapping[str, dict[str, Any]]) -> None:
        """Write down how far jobs of this server are, for the others."""
        with self._database.transaction() as session:
            for identity, now in progress.items():
                session.execute(
                    sa.update(JobRecord).where(*self._held(), JobRecord.id == identity).values(progress=now)
                )

    def _held(self) -> tuple[sa.ColumnElement[bool], ...]:
        return JobRecord.state == ACCEPTED, JobRecord.replica == self.replica

    def _end(self) -> sa.ColumnElement[float]:
        return self._database.now() + self.seconds
