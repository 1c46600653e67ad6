"""What one client may take, so that others get theirs: unfinished requests, bytes of uploads.

Quotas and rates belong here too.
"""

from types import TracebackType
from typing import Self

from pipelines.workers.pool import WorkerPool
from server.errors import KeyLimitReached, UploadsFull

RESERVED = 4  # one place of so many is kept for other keys, where no limit is set
UNCOUNTED = 2**16  # bytes of a body; with connections limited, those of all that are so small have a bound already


class KeyLimits:
    """How many unfinished requests a key may have. A server without keys has one client, which has no limit."""

    def __init__(self, requests: int | None, pool: WorkerPool) -> None:
        self._requests = requests or pool.capacity - pool.capacity // RESERVED
        self._pool = pool

    def check(self, owner: str) -> None:
        """Raises `KeyLimitReached`, which says when one of the key's requests is predicted to end."""
        if owner and len(jobs := self._pool.unfinished_of(owner)) >= self._requests:
            raise KeyLimitReached(len(jobs), self._pool.estimate_end(jobs))


class UploadBudget:
    """The bytes that the bodies of all requests in progress may take together, in memory and in temporary files."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.taken = 0

    def open(self) -> "Upload":
        """One request's share, to be closed when its body is no longer needed."""
        return Upload(self)

    def take(self, count: int) -> None:
        """Raises `UploadsFull`, and takes nothing, where that many bytes are not left."""
        if self.taken + count > self._size:
            raise UploadsFull
        self.taken += count

    def give_back(self, count: int) -> None:
        self.taken -= count


class Upload:
    """What one request's body takes of the budget. A small body takes nothing, so it finds room when all is taken."""

    def __init__(self, budget: UploadBudget) -> None:
        self._budget = budget
        self._received = 0
        self._taken = 0

    def add(self, count: int) -> None:
        """`count` bytes have come. Raises `UploadsFull`: they must be dropped."""
        self._received += count
        if self._received > UNCOUNTED:
            more = self._received - self._taken
            self._budget.take(more)
            self._taken += more

    def close(self) -> None:
        """Give all back. May be called again."""
        self._budget.give_back(self._taken)
        self._taken = self._received = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
