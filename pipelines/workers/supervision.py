"""What the pool needs of whoever keeps an engine alive, and what it gives in return. No torch.

`WorkerSupervisor` keeps a process of this machine alive; `server.cluster` asks engines elsewhere.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from pipelines.engine.base import EngineInfo
from pipelines.job import Job
from pipelines.queueing.cost_model import CostModel
from pipelines.workers.activity import ActivityReport
from pipelines.workers.observer import PoolObserver
from pipelines.workers.protocol import JobEvent
from pipelines.workers.status import WorkerState, WorkerStatus


class SupervisorCallbacks(Protocol):
    """Receives what happens to a supervisor's worker and jobs."""

    cost_model: CostModel
    observer: PoolObserver

    def on_ready(self, supervisor: "EngineSupervisor", info: EngineInfo) -> None: ...

    def on_failed(self, supervisor: "EngineSupervisor") -> None: ...

    def requeue(self, jobs: list[Job], suspects: frozenset[str]) -> None:
        """The worker died while it had these jobs, in the order in which it received them; it was at `suspects`."""
        ...

    def on_job_event(self, supervisor: "EngineSupervisor", job: Job, event: JobEvent) -> None: ...


class EngineSupervisor(Protocol):
    """One engine as the pool sees it. `running` holds its jobs by id; `failure` says why it does not serve."""

    running: dict[str, Job]
    failure: str | None

    @property
    def watch_interval(self) -> float:
        """Seconds between two calls of `watch`."""
        ...

    @property
    def device(self) -> str: ...

    @property
    def ready(self) -> bool: ...

    @property
    def failed(self) -> bool:
        """Whether it gets no work any more."""
        ...

    @property
    def suspended(self) -> bool:
        """Whether the engine died so often that no work should be taken until it is ready."""
        ...

    @property
    def silence(self) -> float:
        """Seconds since the engine was heard of."""
        ...

    @property
    def report(self) -> ActivityReport:
        """What the engine said last of its work."""
        ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def fail(self, reason: str) -> None:
        """Give the engine no work any more."""
        ...

    def run(self, job: Job) -> None:
        """Send a job; what becomes of it is told to `SupervisorCallbacks`."""
        ...

    def count(self, tenant: str) -> int:
        """How many of its jobs are a tenant's."""
        ...

    def cancel(self, job: Job) -> None:
        """Stop a job's work, if it is one of the engine's."""
        ...

    def release(self, job: Job) -> None:
        """Forget a job that has ended."""
        ...

    def watch(self) -> None:
        """Called at intervals."""
        ...

    def status(self) -> WorkerStatus: ...

    @property
    def state(self) -> WorkerState: ...

    @property
    def seconds_to_ready(self) -> float:
        """Predicted, of an engine that sleeps or wakes."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back until `wake`. Raises `CannotSleep`."""
        ...

    def wake(self) -> None: ...


Supervise = Callable[[SupervisorCallbacks], Sequence[EngineSupervisor]]
