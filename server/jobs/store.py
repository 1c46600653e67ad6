"""The durable list of jobs: what was accepted, and how it ended. One transaction a change.

A row is durable before its job is acknowledged, and a job ends in one update that only an unfinished row takes:
whatever crashes, it ends once.
"""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, defer

from pipelines.errors import Cancelled
from server.database.database import Database
from server.envelope import envelope
from server.error_table import row_of
from server.jobs.models import ACCEPTED, CANCELLED, ENDED, EXPIRED, JobRecord, SourcePicture, WebhookDelivery
from server.jobs.outbox import begin_deliveries
from server.usage.ledger import Reservation, UsageEntry, UsageLedger

SWEPT_AT_ONCE = 500  # jobs
TOMBSTONE = 30 * 86400.0  # seconds for which an expired job is still known to have been


class KeyTaken(Exception):
    """Another job has this idempotency key; which one it is can be looked up."""


class JobStore:
    """The jobs in a database, safe to use from several threads. Every method raises what `Database` does."""

    def __init__(self, database: Database, usage: UsageLedger | None = None) -> None:
        self._database = database
        self._usage = usage or UsageLedger(database)

    def add(self, record: JobRecord, source: bytes | None = None, quota: int | None = None, images: int = 0) -> None:
        """Durable when this returns, and with it the source's pixels.

        `quota`: its owner's images a day, of which it takes `images` until it ends. Raises `QuotaSpent`, and `KeyTaken`
        if another job has its owner's idempotency key.
        """
        try:
            with self._database.transaction() as session:
                if quota is not None:
                    self._usage.reserve(session, Reservation(record.id, record.owner, images, quota))
                session.add(record)
                if source is not None:
                    session.add(SourcePicture(record.id, source))
        except sa.exc.IntegrityError as error:
            raise KeyTaken from error

    def source(self, identity: str) -> bytes:
        """The source's pixels of an unfinished job; empty if it has none."""
        with self._database.transaction() as session:
            return session.scalar(sa.select(SourcePicture.pixels).where(SourcePicture.id == identity)) or b""

    def end(
        self,
        identity: str,
        state: str,
        status: int,
        headers: dict[str, str],
        outcome: str,
        *,
        pictures: list[dict[str, Any]] | None = None,
        usage: UsageEntry | None = None,
        free_key: bool = False,
        attempt: int | None = None,
    ) -> bool:
        """End an unfinished job; False if it had ended before, or is not at this `attempt` any more (None: any).

        `usage`: what it has used, written in the same transaction. `free_key`: its idempotency key may be used again.
        """
        ending: dict[str, Any] = {
            "state": state,
            "finished": self._database.now(),
            "status": status,
            "headers": headers,
            "outcome": outcome,
            "pictures": pictures,
            "progress": None,
        }
        if free_key:
            ending["idempotency_key"] = None
        unfinished = [JobRecord.id == identity, JobRecord.state == ACCEPTED]
        if attempt is not None:
            unfinished.append(JobRecord.attempt == attempt)
        with self._database.transaction() as session:
            changed = session.connection().execute(sa.update(JobRecord).where(*unfinished).values(ending)).rowcount
            if changed:
                session.execute(sa.delete(SourcePicture).where(SourcePicture.id == identity))
                begin_deliveries(session, identity, self._database.now())
                self._usage.release(session, [identity])
                self._usage.charge(session, [usage] if usage else [])
        return changed > 0

    def cancel(self, identity: str) -> bool:
        """End an unfinished job as cancelled; its server notices within a second. False if it had ended before."""
        error = Cancelled()
        outcome = json.dumps(envelope(error, identity, f"/v1/jobs/{identity}"))
        return self.end(identity, CANCELLED, row_of(error).status, {}, outcome, free_key=True)

    def find(self, identity: str) -> JobRecord | None:
        return next(iter(self._read(sa.select(JobRecord).where(JobRecord.id == identity))), None)

    def find_key(self, owner: str, key: str) -> JobRecord | None:
        """The job that an owner's idempotency key belongs to."""
        query = sa.select(JobRecord).where(
            JobRecord.owner == owner, JobRecord.idempotency_key == key, JobRecord.state != EXPIRED
        )
        return next(iter(self._read(query)), None)

    def unfinished(self) -> list[JobRecord]:
        """In the order in which they were accepted."""
        return self._read(sa.select(JobRecord).where(JobRecord.state == ACCEPTED).order_by(JobRecord.number))

    def cancelled_among(self, identities: list[str]) -> set[str]:
        """Those that have been cancelled from outside this process."""
        query = sa.select(JobRecord.id).where(JobRecord.state == CANCELLED, JobRecord.id.in_(identities))
        with self._database.transaction() as session:
            return set(session.scalars(query))

    def count_by_state(self) -> dict[str, int]:
        """How many jobs there are in each state that any job is in."""
        query = sa.select(JobRecord.state, sa.func.count()).group_by(JobRecord.state)
        with self._database.transaction() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def unfinished_among(self, identities: list[str]) -> dict[str, dict[str, Any] | None]:
        """Those that have not ended, each with its progress."""
        query = sa.select(JobRecord.id, JobRecord.progress).where(
            JobRecord.state == ACCEPTED, JobRecord.id.in_(identities)
        )
        with self._database.transaction() as session:
            return {row.id: row.progress for row in session.execute(query)}

    def page(self, owner: str | None, limit: int, before: int | None, states: tuple[str, ...]) -> list[JobRecord]:
        """Newest first, without outcomes. `owner` None: everybody's. `before`: only those with a lower `number`."""
        query = sa.select(JobRecord).where(JobRecord.state.in_(states)).order_by(JobRecord.number.desc()).limit(limit)
        query = query.options(defer(JobRecord.outcome))  # those of earlier versions may hold images
        if owner is not None:
            query = query.where(JobRecord.owner == owner)
        if before is not None:
            query = query.where(JobRecord.number < before)
        return self._read(query)

    def sweep(self, expire: float) -> None:
        """Delete what is known of jobs that finished `expire` seconds ago, except their ids; later those too.

        A few at a time, so that each transaction ends in time however much there is. Those that another server is at
        are left to it.
        """
        now = self._database.now()
        old = (JobRecord.finished < now - expire, JobRecord.state.in_(ENDED))
        forgotten = (JobRecord.finished < now - expire - TOMBSTONE, JobRecord.state == EXPIRED)
        while self._sweep_some(old, self._clear):
            pass
        while self._sweep_some(forgotten, self._forget):
            pass

    def _sweep_some(
        self, which: Sequence[sa.ColumnElement[bool]], sweep: Callable[[Session, Collection[str]], None]
    ) -> bool:
        """Whether there may be more."""
        query = sa.select(JobRecord.id).where(*which).limit(SWEPT_AT_ONCE).with_for_update(skip_locked=True)
        with self._database.transaction() as session:
            if found := session.scalars(query).all():
                sweep(session, found)
        return len(found) == SWEPT_AT_ONCE

    @staticmethod
    def _clear(session: Session, identities: Collection[str]) -> None:
        cleared = {
            "state": EXPIRED,
            "request": None,
            "outcome": None,
            "pictures": None,
            "headers": None,
            "idempotency_key": None,
            "body_hash": "",
        }
        session.execute(sa.delete(WebhookDelivery).where(WebhookDelivery.job_id.in_(identities)))
        session.execute(sa.update(JobRecord).where(JobRecord.id.in_(identities)).values(cleared))

    @staticmethod
    def _forget(session: Session, identities: Collection[str]) -> None:
        session.execute(sa.delete(JobRecord).where(JobRecord.id.in_(identities)))

    def _read(self, query: sa.Select[Any]) -> list[JobRecord]:
        with self._database.transaction() as session:
            return list(session.scalars(query))
