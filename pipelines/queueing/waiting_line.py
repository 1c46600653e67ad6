"""The jobs that wait for a worker: tenants take turns by predicted seconds, each tenant's own jobs in order of arrival.

A tenant is whoever shares a place in the line, by a name that means nothing here. Start-time fair queueing (Goyal et
al., 1996): each tenant has a clock that advances by the cost of each job it has dispatched, and the one that is
furthest behind is next; who comes anew begins at the clock of the job that was dispatched last. So one request of a
tenant waits for one turn of each other tenant, however many requests they have waiting.
"""

from collections import deque
from collections.abc import Callable, Iterator

from pipelines.job import Job


def suspicion(job: Job) -> tuple[bool, int]:
    """How likely it is that a job killed its worker."""
    return job.suspect, job.crashes


class WaitingLine:
    """Waiting jobs. `cost` predicts the seconds that a job takes."""

    def __init__(self, cost: Callable[[Job], float]) -> None:
        self._cost = cost
        self._again: deque[Job] = deque()  # whose worker died: before all others
        self._tenants: dict[str, deque[Job]] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._tenants.values()))

    def __contains__(self, job: Job) -> bool:
        return job in self._again or job in self._tenants.get(job.tenant, ())

    def __iter__(self) -> Iterator[Job]:
        """In the order in which they are dispatched, if nothing else comes."""
        yield from self._again
        clocks = dict(self._clocks)
        left = {tenant: deque(jobs) for tenant, jobs in self._tenants.items()}
        while left:
            tenant = min(left, key=lambda name: (clocks[name], left[name][0].admitted))
            job = left[tenant].popleft()
            yield job
            clocks[tenant] += self._cost(job)
            if not left[tenant]:
                del left[tenant]

    def heads(self) -> list[Job]:
        """The jobs that may be dispatched now, the one whose turn it is first. A job that runs again lets none pass."""
        if self._again:
            return [self._again[0]]
        firsts = [jobs[0] for jobs in self._tenants.values()]
        return sorted(firsts, key=lambda job: (self._clocks[job.tenant], job.admitted))

    def append(self, job: Job) -> None:
        if job.tenant not in self._tenants:
            self._tenants[job.tenant] = deque()
            self._clocks[job.tenant] = max(self._now, self._clocks.get(job.tenant, 0.0))
        self._tenants[job.tenant].append(job)

    def put_again(self, job: Job) -> None:
        """A job whose worker died: after those like it, and suspects after those that cannot have been the cause."""
        place = next(
            (at for at, other in enumerate(self._again) if suspicion(other) > suspicion(job)), len(self._again)
        )
        self._again.insert(place, job)

    def take(self, job: Job) -> None:
        """Dispatch one of `heads()`."""
        if job not in self._again:
            self._now = max(self._now, self._clocks[job.tenant])
            self._clocks[job.tenant] += self._cost(job)
        self.remove(job)

    def remove(self, job: Job) -> None:
        """Take a job out that is not dispatched. Its tenant's clock stays."""
        if job in self._again:
            self._again.remove(job)
            return
        jobs = self._tenants[job.tenant]
        jobs.remove(job)
        if not jobs:
            del self._tenants[job.tenant]
        self._clocks = {  # who comes back begins at `now` anyway
            name: clock for name, clock in self._clocks.items() if clock > self._now or name in self._tenants
        }

    def clear(self) -> None:
        self._again.clear()
        self._tenants.clear()
        self._clocks.clear()
