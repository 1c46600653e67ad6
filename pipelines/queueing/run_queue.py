"""Decides which running job takes the next step. Pure Python, no clock.

Tenants share the device by predicted seconds: next is the tenant whose own next job would end first, counted in the
seconds that the tenant has had since it came (weighted fair queueing). A tenant is a name that means nothing here.

Inside a tenant: shortest remaining cost first, so that a small job does not wait for a large one, with ageing, so that
a large one is not overtaken for ever. Costs are predicted device seconds (`cost_model.py`), and so is time here: it
passes with the work that is done. A job that has waited for `w` seconds of others' work counts as `AGEING * w` shorter;
hence a job of cost `c` is overtaken only by jobs that arrive within the next `c / AGEING` seconds of work, and those
are shorter.
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
    tenant: str
    arrived: float
    cost: float
    done: float = 0.0

    @property
    def remaining(self) -> float:
        return self.cost - self.done

    @property
    def priority(self) -> float:
        """Remaining cost less ageing; equal for all times at which nothing of the job itself is done."""
        return self.remaining + AGEING * (self.arrived + self.done)


class RunQueue(Generic[T]):
    """The running jobs by id."""

    def __init__(self) -> None:
        self._entries: dict[str, QueueEntry[T]] = {}
        self._now = 0.0  # seconds of work done since the start
        self._service: dict[str, float] = {}  # seconds, by tenant; who comes anew begins at the least

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return (entry.job for entry in self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, job: T, cost: float, tenant: str = "") -> None:
        """Take in a job of `cost` predicted device seconds."""
        present = {entry.tenant for entry in self._entries.values()}
        least = min((self._service[other] for other in present), default=0.0)
        if tenant not in present:
            before = self._service.get(tenant, 0.0) if present else 0.0
            self._service = {
                other: seconds for other, seconds in self._service.items() if other in present or seconds > least
            }
            self._service[tenant] = max(least, before)
        self._entries[name] = QueueEntry(job, tenant, self._now, cost)

    def remove(self, name: str) -> None:
        """Forget a job; unknown names are fine (it may have finished a moment ago)."""
        self._entries.pop(name, None)

    def peek(self) -> T:
        """The job that takes the next step; of equals, the one that came first."""
        return self.by_priority()[0]

    def by_priority(self) -> list[T]:
        """All jobs, the one that takes the next step first."""
        entries = sorted(self._entries.values(), key=lambda entry: entry.priority)
        ends: dict[str, float] = {}
        for entry in entries:  # the first of each tenant
            ends.setdefault(entry.tenant, self._service[entry.tenant] + entry.remaining)
        return [entry.job for entry in sorted(entries, key=lambda entry: ends[entry.tenant])]

    def advance(self, name: str, done: float) -> None:
        """`done` is the part of the job's cost that is behind it, from 0 to 1."""
        if (entry := self._entries.get(name)) is not None:
            before, entry.done = entry.done, entry.cost * done
            self._now += entry.done - before
            self._service[entry.tenant] += entry.done - before
