"""How many requests a key has sent within the last minute: a moving window, so that advice is exact.

One server counts in memory. Servers that share a database count there by `limits`, which has no storage in one.
"""

import time
from collections import deque
from collections.abc import Sequence
from threading import Lock

import sqlalchemy as sa
from limits import RateLimitItemPerMinute
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter
from sqlalchemy.orm import Session

from server.database.database import Database
from server.database.upsert import lock_row
from server.errors import StorageFailure
from server.security.models import RateWindow

WINDOW = 60.0  # seconds


class DatabaseStorage(Storage, MovingWindowSupport):
    """A storage of `limits` in the database that servers share, by its clock. It has moving windows only."""

    STORAGE_SCHEME = None

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database

    @property
    def base_exceptions(self) -> type[Exception]:
        return StorageFailure

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        with self._database.transaction() as session:
            lock_row(session, RateWindow, {"name": key}, {"hits": []})
            hits, now = self._read(session, key, expiry)
            if len(hits) + amount > limit:
                return False
            row = sa.update(RateWindow).where(RateWindow.name == key)
            session.execute(row.values(hits=[*hits, *[now] * amount]))
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002
        with self._database.transaction() as session:
            hits, now = self._read(session, key, expiry)
        age = now - hits[0] if hits else 0.0
        return time.time() - age, len(hits)  # by this server's clock, as those who ask expect

    def _read(self, session: Session, key: str, expiry: int) -> tuple[Sequence[float], float]:
        """What counts of a window, the oldest first, and the time."""
        now = session.scalar(sa.select(self._database.now())) or 0.0
        hits = session.scalar(sa.select(RateWindow.hits).where(RateWindow.name == key)) or []
        return [moment for moment in hits if moment > now - expiry], now

    def clear(self, key: str) -> None:
        with self._database.transaction() as session:
            session.execute(sa.delete(RateWindow).where(RateWindow.name == key))

    def reset(self) -> int | None:
        with self._database.transaction() as session:
            session.execute(sa.delete(RateWindow))
        return None

    def check(self) -> bool:
        return True

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError

    def get(self, key: str) -> int:
        raise NotImplementedError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError


class RequestRates:
    """Safe to use from several threads. Where the database is `shared`, `take` waits for it and raises what it does."""

    def __init__(self, database: Database) -> None:
        self.shared = database.shared
        self._limiter = MovingWindowRateLimiter(DatabaseStorage(database))
        self._hits: dict[str, deque[float]] = {}  # of each key, on the monotonic clock: no change of the date moves it
        self._refused: dict[tuple[str, int], float] = {}  # until when the database has refused a key, on that clock
        self._lock = Lock()

    def take(self, owner: str, per_minute: int) -> float | None:
        """Count one request. One too many is not counted: the seconds until the next may come."""
        if not self.shared:
            return self._take_here(owner, per_minute)
        limit = RateLimitItemPerMinute(per_minute)
        if self._limiter.hit(limit, owner):
            return None
        wait = max(0.0, self._limiter.get_window_stats(limit, owner).reset_time - time.time())
        self._refused[owner, per_minute] = time.monotonic() + wait
        return wait

    def known_wait(self, owner: str, per_minute: int) -> float | None:
        """The seconds that are left of what a refusal said: until then there is no need to ask the database again."""
        left = self._refused.get((owner, per_minute), 0.0) - time.monotonic()
        if left > 0:
            return left
        self._refused.pop((owner, per_minute), None)
        return None

    def _take_here(self, owner: str, per_minute: int) -> float | None:
        now = time.monotonic()
        with self._lock:
            hits = self._hits.setdefault(owner, deque())
            while hits and hits[0] <= now - WINDOW:
                hits.popleft()
            if len(hits) >= per_minute:
                return hits[-per_minute] + WINDOW - now
            hits.append(now)
        return None
