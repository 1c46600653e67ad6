"""Decides which running job takes the next step. Pure Python, no clock.

Shortest remaining cost first, so that a small job does not wait for a large one, with ageing, so that a large one is
not overtaken for ever. Costs are predicted device seconds (`cost_model.py`), and so is time here: it passes with the
work that is done. A job that has waited for `w` seconds of others' work counts as `AGEING * w` shorter; hence a job of
cost `c` is overtaken only by jobs that arrive within the next `c / AGEING` seconds of work, and those are shorter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

AGEING = 0.25  # a quarter: a job waits for at most four times its own cost of work that came later

T = TypeVar("T")


@dataclass(slots=True)
class QueueEntry(Generic[T]):
    """A running job: when it came, what it was predicted to cost, and how much of that is done."""

    job: T
    arrived: float
    cost: float
    done: float = 0.0

    @property
    def priority(self) -> float:
        """Remaining cost less ageing; equal for all times at which nothing of the job itself is done."""
        return self.cost - self.done + AGEING * (self.arrived + self.done)


class RunQueue(Generic[T]):
    """The running jobs by id."""

    def __init__(self) -> None:
        self._entries: dict[str, QueueEntry[T]] = {}
        self._now = 0.0  # seconds of work done since the start

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return (entry.job for entry in self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, job: T, cost: float) -> None:
        """Take in a job of `cost` predicted device seconds."""
        self._entries[name] = QueueEntry(job, self._now, cost)

    def remove(self, name: str) -> None:
        """Forget a job; unknown names are fine (it may have finished a moment ago)."""
        self._entries.pop(name, None)

    def peek(self) -> T:
        """The job that takes the next step; of equals, the one that came first."""
        return min(self._entries.values(), key=lambda entry: entry.priority).job

    def by_priority(self) -> list[T]:
        """All jobs, the one that takes the next step first."""
        return [entry.job for entry in sorted(self._entries.values(), key=lambda entry: entry.priority)]

    def advance(self, name: str, done: float) -> None:
        """`done` is the part of the job's cost that is behind it, from 0 to 1."""
        if (entry := self._entries.get(name)) is not None:
            before, entry.done = entry.done, entry.cost * done
            self._now += entry.done - before
