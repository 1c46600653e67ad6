"""A server in simulated time: the pool is the real one, its devices are queues of plans.

Admission, dispatching and predictions are `WorkerPool`'s own, the order of steps on a device is `RunQueue`'s. So what
is simulated is only the time that passes: there is no formula here for who is refused or who is next.
"""

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from bench.support.plans import Kind
from pipelines.engine.base import EngineInfo
from pipelines.errors import DeadlineExceeded, QueueFull
from pipelines.job import Event, EventChannel, Job
from pipelines.queueing.cost_model import CostModel
from pipelines.queueing.run_queue import RunQueue
from pipelines.request import Timings
from pipelines.workers.activity import IDLE, ActivityReport
from pipelines.workers.pool import WorkerPool
from pipelines.workers.protocol import JobDone
from pipelines.workers.status import WorkerState, WorkerStatus
from pipelines.workers.supervision import EngineSupervisor, SupervisorCallbacks

INFO = EngineInfo("simulated", "none", "none", "f" * 32)


@dataclass(frozen=True)
class Limits:
    """Of one server, as its settings have them."""

    devices: int = 1
    queue_size: int = 64
    max_running: int = 16
    request_timeout: float = 600.0


@dataclass(eq=False)
class Visit:
    """A request: when it came, and how it ended. `ended` is None where it was refused or timed out."""

    arrived: float
    kind: Kind
    ended: float | None = None
    refused: bool = False
    device_seconds: float = 0.0

    @property
    def seconds(self) -> float | None:
        return None if self.ended is None else self.ended - self.arrived


def draw_arrivals(kinds: Sequence[Kind], rate: float, requests: int, seed: int = 1) -> list[Visit]:
    """A Poisson stream of `rate` requests a second, each of a kind by the kinds' shares."""
    chance = random.Random(seed)
    shares = [kind.share for kind in kinds]
    visits, now = [], 0.0
    for _ in range(requests):
        now += chance.expovariate(rate)
        visits.append(Visit(now, chance.choices(kinds, shares)[0]))
    return visits


class Clock:
    """Simulated seconds, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class VisitChannel(EventChannel):
    """Where a job's events go, which nobody reads; by it the device knows whose job it is."""

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self.visit = visit

    def publish(self, event: Event) -> None: ...


class Work:
    """A job on its device: what it still has to do, step by step. As in the worker, text comes with the first step."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.channel, VisitChannel)
        self.job = job
        self.visit = job.channel.visit
        plan, images = self.visit.kind.plan, len(job.request.seeds)
        image = [*((seconds, True) for seconds in plan.steps), (plan.decode, False)]
        parts = deque(image * images)
        parts[0] = (plan.text + parts[0][0], True)
        self._parts = parts
        self._steps = self._left = len(plan.steps) * images

    @property
    def next_seconds(self) -> float:
        return self._parts[0][0]

    @property
    def remaining_fraction(self) -> float:
        """Of its steps."""
        return self._left / self._steps

    @property
    def done(self) -> bool:
        return not self._parts

    def take(self) -> None:
        """The next part is done."""
        seconds, is_step = self._parts.popleft()
        self.visit.device_seconds += seconds
        self._left -= is_step


class SimulatedDevice:
    """An `EngineSupervisor` whose worker is a run queue in simulated time."""

    suspended = False
    failed = False
    failure: str | None = None
    silence = 0.0
    report: ActivityReport = IDLE
    watch_interval = 1.0
    ready = True
    state: WorkerState = "ready"
    seconds_to_ready = 0.0

    def __init__(self, number: int, clock: Clock, callbacks: SupervisorCallbacks) -> None:
        self.device = f"simulated {number}"
        self.running: dict[str, Job] = {}
        self._clock = clock
        self._callbacks = callbacks
        self._queue: RunQueue[Work] = RunQueue()
        self._cost_model = CostModel()  # the worker's own, as in its step loop
        self._busy = False

    def run(self, job: Job) -> None:
        self.running[job.id] = job
        work = Work(job)
        self._queue.add(job.id, work, self._cost_model.estimate_seconds(job.request), job.tenant)
        self._go_on()

    def _go_on(self) -> None:
        if self._queue and not self._busy:
            work = self._queue.peek()
            self._busy = True
            self._clock.at(self._clock.now + work.next_seconds, lambda: self._end_part(work))

    def _end_part(self, work: Work) -> None:
        self._busy = False
        job = work.job
        work.take()
        if job.id in self._queue:
            job.remaining_fraction = work.remaining_fraction
            self._queue.advance(job.id, 1 - work.remaining_fraction)
            if work.done:
                self._end_job(work)
        self._go_on()

    def _end_job(self, work: Work) -> None:
        job, timings = work.job, Timings(denoise=work.visit.device_seconds)
        self._queue.remove(job.id)
        self._cost_model.record_job(job.request, timings)
        work.visit.ended = self._clock.now
        job.pixels = dict.fromkeys(range(len(job.request.seeds)), b"")
        self._callbacks.on_job_event(self, job, JobDone(job.id, timings, stages=(), notes=()))

    def count(self, tenant: str) -> int:
        return sum(job.tenant == tenant for job in self.running.values())

    def cancel(self, job: Job) -> None:
        self.running.pop(job.id, None)
        self._queue.remove(job.id)

    def release(self, job: Job) -> None:
        del self.running[job.id]

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def fail(self, reason: str) -> None:
        raise AssertionError(reason)  # simulated devices are all alike

    def watch(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def status(self) -> WorkerStatus:
        return WorkerStatus(self.device, "ready", "ready", 1.0, 0.0, None, len(self.running), 0, None)


class Simulation:
    """One server."""

    def __init__(self, limits: Limits) -> None:
        self._clock = Clock()
        self._limits = limits
        self._pool = WorkerPool(
            self._make_devices,
            queue_size=limits.queue_size,
            max_running=limits.max_running,
            request_timeout=limits.request_timeout,
        )
        for device in self._pool.supervisors:
            self._pool.on_ready(device, INFO)

    def _make_devices(self, callbacks: SupervisorCallbacks) -> Sequence[EngineSupervisor]:
        return [SimulatedDevice(number, self._clock, callbacks) for number in range(self._limits.devices)]

    def run(self, visits: Sequence[Visit]) -> None:
        """Let all visits happen, and note how they end."""
        for visit in visits:
            self._clock.at(visit.arrived, lambda visit=visit: self._arrive(visit))  # type: ignore[misc]
        self._clock.run()

    def _arrive(self, visit: Visit) -> None:
        try:
            job = self._pool.submit(visit.kind.request, channel=VisitChannel(visit))
        except QueueFull:
            visit.refused = True
            return
        patience = self._limits.request_timeout
        self._clock.at(self._clock.now + patience, lambda: self._pool.cancel(job, DeadlineExceeded(patience)))


def simulate(limits: Limits, visits: Sequence[Visit]) -> None:
    """Run a server with these arrivals in simulated time; what became of each is noted in it."""

    async def run() -> None:  # jobs have futures, which need a loop to belong to
        Simulation(limits).run(visits)

    asyncio.run(run())
