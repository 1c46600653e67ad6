"""Which job goes to which worker, and when: the waiting jobs, the workers' capacity, the predictions. No torch.

All workers produce the same bytes, so it does not matter which of them runs a job. A job that may
have killed its worker (a suspect) runs alone.
"""

from collections.abc import Iterator, Sequence

from pipelines.job import Job, Progress
from pipelines.queueing.cost_model import CostModel
from pipelines.queueing.waiting_line import WaitingLine
from pipelines.workers.idleness import IdleRelease
from pipelines.workers.supervision import EngineSupervisor

RESERVED = 4  # one place of so many is kept for other tenants: they must not wait for a large job to end


class Dispatcher:
    """The jobs that wait, and the workers of `supervisors`, each of which takes up to `max_running` jobs."""

    def __init__(
        self, supervisors: Sequence[EngineSupervisor], cost_model: CostModel, max_running: int, idleness: IdleRelease
    ) -> None:
        self._supervisors = supervisors
        self._cost_model = cost_model
        self._idleness = idleness
        self._max_running = max_running
        self._places = max_running - max_running // RESERVED  # that one tenant may take
        self.waiting = WaitingLine(lambda job: cost_model.estimate_seconds(job.request))

    def unfinished(self) -> Iterator[Job]:
        """Those that run, then those that wait."""
        yield from self.running()
        yield from self.waiting

    def running(self) -> list[Job]:
        return [job for supervisor in self._supervisors for job in supervisor.running.values()]

    def dispatch(self) -> None:
        """Send jobs to the workers that have capacity, and publish the positions of the others."""
        while choice := self._choose():
            job, supervisor = choice
            self.waiting.take(job)
            supervisor.run(job)
        self._publish_positions()

    def estimate_end(self, jobs: Sequence[Job]) -> float:
        """Predicted seconds until the first of a tenant's `jobs` ends, where tenants take turns."""
        shortest = min(self.estimate_seconds([job]) for job in jobs)
        tenants = {job.tenant for job in self.unfinished()}
        return shortest * len(tenants) / self._count_ready()

    def estimate_wait(self) -> float:
        """Predicted seconds of work before a request that arrives now would start."""
        return self._idleness.seconds_to_ready + self.estimate_seconds([*self.unfinished()]) / self._count_ready()

    def estimate_left(self, supervisor: EngineSupervisor, job: Job) -> float:
        """Predicted seconds until a running job ends. Its worker runs the shortest first: all that are not longer."""
        remaining = [self.estimate_seconds([other]) for other in supervisor.running.values()]
        own = self.estimate_seconds([job])
        return sum(other for other in remaining if other <= own)

    def estimate_seconds(self, jobs: Sequence[Job]) -> float:
        """Predicted device seconds for what is left of `jobs`."""
        return sum(self._cost_model.estimate_seconds(job.request, job.remaining_fraction) for job in jobs)

    def _count_ready(self) -> int:
        """How many workers share the queue; at least 1."""
        return max(1, sum(supervisor.ready for supervisor in self._supervisors))

    def _choose(self) -> tuple[Job, EngineSupervisor] | None:
        """The next job, and its worker; another tenant's job where the first one's tenant has its share of places."""
        for job in self.waiting.heads():
            if supervisor := self._select_worker(job):
                return job, supervisor
        return None

    def _select_worker(self, job: Job) -> EngineSupervisor | None:
        """The ready worker with capacity that has the least work. A suspect runs alone."""
        free = [
            supervisor
            for supervisor in self._supervisors
            if supervisor.ready
            and len(supervisor.running) < (1 if job.suspect else self._max_running)
            and supervisor.count(job.tenant) < (self._places if job.tenant else self._max_running)
            and not any(other.suspect for other in supervisor.running.values())
        ]
        return min(free, key=lambda supervisor: self.estimate_seconds([*supervisor.running.values()]), default=None)

    def publish_waking(self) -> None:
        """Tell those who wait for a worker that wakes how long that will still take. Call it at intervals."""
        if self._idleness.waking:
            self._publish_positions()

    def _publish_positions(self) -> None:
        """Publish the position of every waiting job whose position has changed, of all while a worker wakes."""
        waking = self._idleness.seconds_to_ready
        stage = "waking" if waking else "queued"
        ahead = self.estimate_seconds(self.running())
        for position, job in enumerate(self.waiting):
            ahead += self._cost_model.estimate_seconds(job.request)
            latest = job.channel.latest()
            if waking or latest is None or latest.stage != stage or latest.position != position:
                job.publish(Progress(stage, position=position, eta=waking + ahead / self._count_ready()))
