"""Which running job takes the next step. Pure Python.

First come, first served, interleaved: the running jobs take turns step by step, so a long one cannot hold back a
short one. How many run at once is the pool's decision.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """A ring of running jobs by id."""

    def __init__(self) -> None:
        self._ring: deque[str] = deque()
        self._jobs: dict[str, T] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[T]:
        return iter(self._jobs.values())

    def add(self, name: str, job: T) -> None:
        self._jobs[name] = job
        self._ring.append(name)

    def drop(self, name: str) -> None:
        """Forget a job; unknown names are fine (it may have finished a moment ago)."""
        if self._jobs.pop(name, None) is not None:
            self._ring.remove(name)

    def next(self) -> T:
        """The job whose turn it is; it goes to the end of the ring."""
        name = self._ring[0]
        self._ring.rotate(-1)
        return self._jobs[name]
