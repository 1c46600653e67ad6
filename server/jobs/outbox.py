"""What is to be told to receivers, and how that went: durable, and written with what ends a job.

A delivery waits for its job, is pending until its receiver takes it, and is delivered or failed in the end. Whoever
claims one has `CLAIM` seconds; then it is pending again, also where that server was killed.
"""

import hashlib
import hmac
import secrets
from collections.abc import Collection
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.database.database import Database
from server.database.upsert import lock_row
from server.jobs.models import DELIVERED, FAILED, PENDING, WAITING, JobRecord, SigningKey, WebhookDelivery

CLAIM = 60.0  # seconds
RETRIES = (5.0, 30.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0)  # seconds to the next attempt: for most of a day
MASTER = "webhooks"  # the name of the key in the database


class Claim(NamedTuple):
    """A delivery that is on its way, and the job that it tells of."""

    delivery: WebhookDelivery
    job: JobRecord


def begin_deliveries(session: Session, job_id: str, now: sa.ColumnElement[float]) -> None:
    """Part of the transaction that ends a job."""
    waiting = (WebhookDelivery.job_id == job_id, WebhookDelivery.state == WAITING)
    session.execute(sa.update(WebhookDelivery).where(*waiting).values(state=PENDING, due=now))


class Outbox:
    """The deliveries in a database, safe to use from several threads. Every method raises what `Database` does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, busy_hosts: Collection[str], busy_owners: Collection[str]) -> Claim | None:
        """The one that has been due for the longest, of other hosts and owners than these. It is one more attempt."""
        due = (WebhookDelivery.state == PENDING, WebhookDelivery.due <= self._database.now())
        free = (WebhookDelivery.host.not_in(busy_hosts), WebhookDelivery.owner.not_in(busy_owners))
        query = sa.select(WebhookDelivery).where(*due, *free).order_by(WebhookDelivery.due).limit(1)
        with self._database.transaction() as session:
            delivery = session.scalars(query.with_for_update(skip_locked=True)).one_or_none()
            if delivery is None:
                return None
            delivery.attempts += 1
            delivery.due = self._database.now() + CLAIM
            session.flush()
            session.refresh(delivery)
            job = session.scalars(sa.select(JobRecord).where(JobRecord.id == delivery.job_id)).one()
        return Claim(delivery, job)

    def finish(self, delivery: WebhookDelivery, status: int | None, *, delivered: bool, final: bool) -> None:
        """Note how an attempt went: the receiver's `status`, None without one. `final`: it is not tried again."""
        over = delivered or final or delivery.attempts > len(RETRIES)
        wait = 0.0 if over else RETRIES[delivery.attempts - 1]
        now = self._database.now()
        values = {
            "state": DELIVERED if delivered else FAILED if over else PENDING,
            "due": None if over else now + wait,
            "status": status,
            "delivered": now if delivered else None,
        }
        same = (WebhookDelivery.job_id == delivery.job_id, WebhookDelivery.attempts == delivery.attempts)
        with self._database.transaction() as session:
            session.execute(sa.update(WebhookDelivery).where(*same).values(values))

    def master(self) -> bytes:
        """The secret from which those of keys follow, made at its first use."""
        with self._database.transaction() as session:
            lock_row(session, SigningKey, {"name": MASTER}, {"value": secrets.token_hex(32)})
            value = session.scalars(sa.select(SigningKey.value).where(SigningKey.name == MASTER)).one()
        return bytes.fromhex(value)


def derive_secret(master: bytes, owner: str) -> bytes:
    """An owner's own secret, so that no receiver can sign in the name of another key's server."""
    return hmac.digest(master, f"webhooks\n{owner}".encode(), hashlib.sha256)
