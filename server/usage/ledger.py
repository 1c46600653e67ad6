"""What was used, and what may still be: parts of the transactions that accept and end requests.

A quota counts the images drawn today and those of all unfinished requests, so that no number of parallel requests
exceeds it, over any number of servers. The row of the owner's day is the lock.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.database.database import Database
from server.database.upsert import add_to_row
from server.errors import QuotaSpent
from server.usage.models import HASHED, ImageReservation, UsageRecord

SHOWN = 30 * 86400.0  # seconds
AMOUNTS = ("requests", "images", "pixels", "device_seconds", "credits")


@dataclass(frozen=True, slots=True)
class UsageEntry:
    """What one finished request has used. `pixels` are those of all its images together."""

    owner: str
    images: int
    pixels: int
    device_seconds: float
    credits: int
    requests: int = 1


@dataclass(frozen=True, slots=True)
class Reservation:
    """Images that a request is about to draw, of an owner who may have `quota` of them a day.

    `seconds`: how long it is valid at most; None: until the job `id` ends.
    """

    id: str
    owner: str
    images: int
    quota: int
    seconds: float | None = None


class UsageLedger:
    """The usage in a database, safe to use from several threads. Every method raises what `Database` does."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        """`now`: the date in Unix seconds, which says what day it is."""
        self._database = database
        self._now = now

    def reserve(self, session: Session, reservation: Reservation) -> None:
        """Part of a transaction. Raises `QuotaSpent`."""
        owner, day = reservation.owner, self.today()
        add_to_row(session, UsageRecord, {"owner": owner, "day": day}, dict.fromkeys(AMOUNTS, 0))
        self._check(session, owner, reservation.images, reservation.quota)
        expires = None if reservation.seconds is None else self._database.now() + reservation.seconds
        values = {"id": reservation.id, "owner": owner, "images": reservation.images, "expires": expires}
        session.execute(sa.insert(ImageReservation).values(values))

    def check(self, owner: str, images: int, quota: int) -> None:
        """Raises `QuotaSpent` where so many images are not left now, and reserves none."""
        with self._database.transaction() as session:
            self._check(session, owner, images, quota)

    def _check(self, session: Session, owner: str, images: int, quota: int) -> None:
        drawn = session.scalar(
            sa.select(UsageRecord.images).where(UsageRecord.owner == owner, UsageRecord.day == self.today())
        )
        alive = sa.or_(ImageReservation.expires.is_(None), ImageReservation.expires > self._database.now())
        under_way = session.scalar(
            sa.select(sa.func.coalesce(sa.func.sum(ImageReservation.images), 0)).where(
                ImageReservation.owner == owner, alive
            )
        )
        left = quota - (drawn or 0) - (under_way or 0)
        if images > left:
            raise QuotaSpent(quota, max(0, left))

    def release(self, session: Session, identities: Iterable[str]) -> None:
        """Part of a transaction: forget reservations, whether or not they are there."""
        if known := list(identities):
            session.execute(sa.delete(ImageReservation).where(ImageReservation.id.in_(known)))

    def charge(self, session: Session, entries: Iterable[UsageEntry]) -> None:
        """Part of a transaction: add what requests have used to their owners' day."""
        sums: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in entries:
            sums[entry.owner].update({name: getattr(entry, name) for name in AMOUNTS})
        for owner, amounts in sorted(sums.items()):  # in one order, so that no two servers wait for each other
            add_to_row(session, UsageRecord, {"owner": owner, "day": self.today()}, amounts)

    def accept(self, reservation: Reservation) -> None:
        """Reserve in a transaction of its own. Raises `QuotaSpent`."""
        with self._database.transaction() as session:
            self.reserve(session, reservation)

    def settle(self, entries: Iterable[UsageEntry], reservations: Iterable[str]) -> None:
        """Charge and release, in one transaction."""
        with self._database.transaction() as session:
            self.charge(session, entries)
            self.release(session, reservations)

    def sweep(self) -> None:
        """Forget reservations that are over."""
        with self._database.transaction() as session:
            session.execute(sa.delete(ImageReservation).where(ImageReservation.expires < self._database.now()))

    def report(self, since: str, until: str, owner: str | None = None) -> list[UsageRecord]:
        """The days from `since` to `until`, both included, of one owner or of all; those with requests.

        `owner`: as it is kept, or as `describe_usage` shows it.
        """
        query = sa.select(UsageRecord).where(UsageRecord.day.between(since, until), UsageRecord.requests > 0)
        if owner is not None:
            is_hash = owner.startswith(HASHED)
            shown = UsageRecord.owner.startswith(owner.removeprefix(HASHED), autoescape=True)
            query = query.where(shown if is_hash else UsageRecord.owner == owner)
        with self._database.transaction() as session:
            return list(session.scalars(query.order_by(UsageRecord.day, UsageRecord.owner)))

    def today(self) -> str:
        return day_of(self._now())


def day_of(moment: float) -> str:
    """The day of UTC, as `2026-11-26`."""
    return datetime.fromtimestamp(moment, UTC).date().isoformat()


def choose_days(since: str | None, until: str | None) -> tuple[str, str]:
    """The first and the last day of a report: the last 30 days, where nothing else is asked for."""
    now = time.time()
    return since or day_of(now - SHOWN), until or day_of(now)
