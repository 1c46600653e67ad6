"""How many requests a key has sent within the last minute: a moving window, so that advice is exact.

One server counts in memory, by a clock that no change of the date moves. Servers that share a database count there, by
its clock.
"""

import time
from collections.abc import Sequence
from threading import Lock

import sqlalchemy as sa

from server.database.database import Database
from server.database.upsert import lock_row
from server.security.models import RateWindow

WINDOW = 60.0  # seconds


class RequestRates:
    """Counts the requests of each owner. `shared`: it asks a database, so call `take` in a thread then."""

    def __init__(self, database: Database) -> None:
        self.shared = database.shared
        self._database = database
        self._hits: dict[str, list[float]] = {}  # the moments of each owner's requests, the oldest first
        self._refused: dict[tuple[str, int], float] = {}  # until when the database has refused an owner
        self._lock = Lock()

    def take(self, owner: str, per_minute: int) -> float | None:
        """Count one request. One too many is not counted: the seconds until the next may come.

        Raises a `StorageFailure` where it is `shared`.
        """
        if self.shared:
            return self._take_from_all(owner, per_minute)
        now = time.monotonic()
        with self._lock:
            hits = self._hits[owner] = recent(self._hits.get(owner, ()), now)
            wait = wait_of(hits, per_minute, now)
            if wait is None:
                hits.append(now)
        return wait

    def cached_wait(self, owner: str, per_minute: int) -> float | None:
        """The seconds that are left of what a refusal said: until then there is no need to ask the database again."""
        left = self._refused.get((owner, per_minute), 0.0) - time.monotonic()
        if left > 0:
            return left
        self._refused.pop((owner, per_minute), None)
        return None

    def _take_from_all(self, owner: str, per_minute: int) -> float | None:
        with self._database.transaction() as session:
            lock_row(session, RateWindow, {"name": owner}, {"hits": []})
            now = session.scalar(sa.select(self._database.now())) or 0.0
            hits = recent(session.scalar(sa.select(RateWindow.hits).where(RateWindow.name == owner)) or (), now)
            wait = wait_of(hits, per_minute, now)
            if wait is None:
                session.execute(sa.update(RateWindow).where(RateWindow.name == owner).values(hits=[*hits, now]))
        if wait is not None:
            self._refused[owner, per_minute] = time.monotonic() + wait
        return wait


def recent(hits: Sequence[float], now: float) -> list[float]:
    """Those that still count."""
    return [moment for moment in hits if moment > now - WINDOW]


def wait_of(hits: Sequence[float], per_minute: int, now: float) -> float | None:
    """The seconds until another request may come; None if it may come now."""
    return hits[-per_minute] + WINDOW - now if len(hits) >= per_minute else None
