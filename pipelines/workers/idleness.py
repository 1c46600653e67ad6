"""Lets workers sleep when nobody asks for anything, so that others can use the device, and wakes them. No torch.

A worker that sleeps is no process: so all of its device's memory is free for certain, whatever a library keeps, and
all of its host memory too. What it loads when it wakes is in the system's page cache, as long as nobody needs that.
"""

import time
from collections.abc import Callable, Sequence

import structlog

from pipelines.errors import WorkersBusy
from pipelines.workers.supervision import EngineSupervisor

log = structlog.get_logger("srpo")


class IdleRelease:
    """Watches how long nothing was asked. `seconds`: after which workers sleep by themselves; None: never.

    `busy` says whether there are unfinished jobs, which are never left without a worker.
    """

    def __init__(
        self, supervisors: Sequence[EngineSupervisor], seconds: float | None, busy: Callable[[], bool]
    ) -> None:
        self._supervisors = supervisors
        self._seconds = seconds
        self._busy = busy
        self._quiet_since = time.monotonic()

    @property
    def asleep(self) -> bool:
        """Whether no worker serves, and one sleeps that would on demand."""
        return self._have("asleep") and not self._have("ready")

    @property
    def waking(self) -> bool:
        """Whether no worker serves yet, and one is on its way that had slept."""
        return self._have("waking") and not self._have("ready")

    @property
    def seconds_to_ready(self) -> float:
        """Predicted, of workers that sleep or wake; 0 where one is ready or none of them does."""
        if not (self.asleep or self.waking):
            return 0.0
        return min(one.seconds_to_ready for one in self._supervisors if one.state in ("asleep", "waking"))

    def begin(self) -> None:
        """A worker is ready: the time counts from now on."""
        self._quiet_since = time.monotonic()

    def look(self) -> None:
        """Call it at intervals."""
        now = time.monotonic()
        if self._busy() or not self._have("ready"):
            self._quiet_since = now
        elif self._seconds is not None and now - self._quiet_since >= self._seconds:
            self.sleep()

    def sleep(self) -> None:
        """End the workers that are ready. Raises `WorkersBusy` where there are unfinished jobs."""
        if self._busy():
            raise WorkersBusy
        for supervisor in self._supervisors:
            if supervisor.ready:
                supervisor.sleep()
                log.info("worker_sleeps", device=supervisor.device)

    def wake(self) -> None:
        """Start the workers that sleep, as every request does. Returns at once."""
        self._quiet_since = time.monotonic()
        for supervisor in self._supervisors:
            if supervisor.state == "asleep":
                supervisor.wake()
                log.info("worker_wakes", device=supervisor.device)

    def _have(self, state: str) -> bool:
        return any(supervisor.state == state for supervisor in self._supervisors)
