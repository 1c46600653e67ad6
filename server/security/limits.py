"""What one client may take, so that others get theirs: the bytes of uploads; quotas and rates belong here too."""

from types import TracebackType
from typing import Self

from server.errors import UploadsFull

UNCOUNTED = 2**16  # bytes of a body; with connections limited, those of all that are so small have a bound already


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
