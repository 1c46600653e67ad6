"""The bounded line and the workers behind it, one for each device. No torch.

A request is refused before any work or it is accepted, and then it ends in exactly one of: its images, an error of
its own, its deadline, its caller's cancel. A worker's death loses nothing: its jobs go back to the head of the line
and run again, each alone, so that one which kills its worker a second time is known and fails by itself. All workers
draw the same bytes, so it does not matter which of them a job meets.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from pipelines.engine.base import EngineConfig, EngineInfo
from pipelines.errors import (
    FAILURES,
    Cancelled,
    DeadlineExceeded,
    Draining,
    NotReady,
    PipelineError,
    QueueFull,
    WorkerCrashed,
)
from pipelines.job import EventChannel, Job, Preview, PreviewPlan, Progress
from pipelines.request import ImageRequest, ImageResult, Timings
from pipelines.workers.cost_model import CostModel
from pipelines.workers.protocol import Message
from pipelines.workers.supervisor import WorkerStatus, WorkerSupervisor

MAX_CRASHES = 2
log = structlog.get_logger("srpo")


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What the pool is doing. `state` is `loading`, `ready` (a worker is), `restarting`, `failed` or `draining`."""

    state: str
    stage: str
    progress: float
    eta: float
    waiting: int
    running: int
    restarts: int
    worker_pids: tuple[int, ...]
    info: EngineInfo | None
    failure: str | None
    workers: tuple[WorkerStatus, ...] = ()


class WorkerPool:
    """One line of jobs in front of the workers of `devices`; without any, of the one that `config` names."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        devices: Sequence[str] = (),
        queue_size: int = 64,
        max_running: int = 16,
        request_timeout: float = 600.0,
        step_timeout: float = 120.0,
    ) -> None:
        self.cost_model = CostModel()
        self.failed = asyncio.Event()  # set when no engine can be loaded: a wrong file, not a passing fault
        self._supervisors = [
            WorkerSupervisor(replace(config, device=device), self) for device in devices or (config.device,)
        ]
        self._room = queue_size + max_running * len(self._supervisors)
        self._max_running = max_running
        self._request_timeout = request_timeout
        self._step_timeout = step_timeout
        self._line: deque[Job] = deque()
        self._draining = False
        self._info: EngineInfo | None = None

    # --- for the caller -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Spawn the workers. Returns at once; `status()` follows the loading."""
        self._watchdog = asyncio.create_task(self._watch())
        for supervisor in self._supervisors:
            await supervisor.start()

    async def stop(self) -> None:
        """Stop the workers; what is unfinished ends as `Draining`."""
        self._draining = True
        self._watchdog.cancel()
        for job in (*self._running(), *self._line):
            job.finish(Draining())
        self._line.clear()
        await asyncio.gather(*(supervisor.stop() for supervisor in self._supervisors))

    def drain(self) -> None:
        """Take no new work; what was accepted goes on."""
        self._draining = True

    def check_room(self) -> None:
        """Raise what `submit` would raise now: `NotReady`, `Draining` or `QueueFull`."""
        if self._draining:
            raise Draining
        if self._info is None:
            status = self.status()
            raise NotReady(status.stage, status.progress, status.eta)
        if len(self._line) + len(self._running()) >= self._room:
            raise QueueFull(len(self._line), self.seconds_ahead())

    def submit(
        self,
        request: ImageRequest,
        previews: PreviewPlan = PreviewPlan(),  # noqa: B008 - frozen
        channel: EventChannel | None = None,
    ) -> Job:
        """Put a request in the line. Raises `NotReady`, `Draining` or `QueueFull`, before any work.

        The job's events go to `channel`, which the caller closes; without one, to a channel of the job's own.
        """
        self.check_room()
        job = Job(
            secrets.token_hex(16),
            request,
            deadline=time.monotonic() + self._request_timeout,
            previews=previews,
            channel=channel or EventChannel(),
            owns_channel=channel is None,
        )
        self._line.append(job)
        self._dispatch()
        return job

    def cancel(self, job: Job, reason: PipelineError | None = None) -> None:
        """End a job; its work stops within one step. Finished jobs stay as they are."""
        if job.finished:
            return
        job.finish(reason or Cancelled())
        for supervisor in self._supervisors:
            supervisor.cancel(job)
        if job in self._line:
            self._line.remove(job)
        self._dispatch()

    def seconds_ahead(self) -> float:
        """Predicted seconds of work before a request that arrives now would start."""
        return self._seconds([*self._running(), *self._line]) / self._workers()

    def status(self) -> PoolStatus:
        workers = tuple(supervisor.status() for supervisor in self._supervisors)
        state = self._state()
        best = max(workers, key=lambda worker: (worker.state == "ready", worker.state != "failed", worker.progress))
        failures = [worker for worker in workers if worker.failure]
        return PoolStatus(
            state=state,
            stage=best.stage,
            progress=best.progress,
            eta=best.eta,
            waiting=len(self._line),
            running=len(self._running()),
            restarts=sum(worker.restarts for worker in workers),
            worker_pids=tuple(worker.pid for worker in workers if worker.pid is not None),
            info=self._info,
            failure="\n".join(said(worker, alone=len(workers) == 1) for worker in failures) or None,
            workers=workers,
        )

    def _state(self) -> str:
        if self._draining:
            return "draining"
        if self.failed.is_set():
            return "failed"
        if any(supervisor.ready for supervisor in self._supervisors):
            return "ready"
        return "loading" if self._info is None else "restarting"

    # --- for the supervisors ------------------------------------------------------------------------------------

    def on_ready(self, supervisor: WorkerSupervisor, info: EngineInfo) -> None:
        """Its worker takes jobs, unless it would draw other bytes than the workers beside it."""
        others = any(other.ready for other in self._supervisors if other is not supervisor)
        if others and self._info is not None and info.fingerprint != self._info.fingerprint:
            supervisor.give_up(
                f"{info.device} (fingerprint {info.fingerprint}) draws other bytes than {self._info.device} "
                f"({self._info.fingerprint}): serve unlike devices with a server each"
            )
            return
        self._info = info
        self._dispatch()

    def on_given_up(self, supervisor: WorkerSupervisor) -> None:
        if all(other.given_up for other in self._supervisors):
            self.failed.set()
        else:
            log.error("worker_failed", device=supervisor.device, reason=supervisor.failure)

    def on_orphans(self, jobs: list[Job]) -> None:
        """Back to the head of the line. Suspects run alone (see `_free_for`)."""
        for job in reversed(jobs):
            job.crashes += 1
            job.pixels.clear()
            job.left = 1.0
            if job.crashes < MAX_CRASHES:
                self._line.appendleft(job)
            else:
                job.finish(WorkerCrashed())
        self._dispatch()

    def on_job_event(self, supervisor: WorkerSupervisor, job: Job, event: str, message: Message) -> None:
        header: dict[str, Any] = message.header
        match event:
            case "step":
                job.left = header["left"]
                job.publish(self._progress(supervisor, job, header["stage"], header["image"], header["step"]))
            case "preview":
                size = (header["width"], header["height"])
                job.publish(Preview(header["image"], header["index"], *size, message.payload))
            case "image":
                job.pixels[header["image"]] = message.payload
            case "done":
                self._end(supervisor, job, self._collect(job, header["timings"], header["notes"]))
                self.cost_model.drawn(job.request, header["timings"])
            case "failed":
                self._end(supervisor, job, FAILURES[header["error"]]())

    # --- jobs ---------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """End jobs past their deadline, and kill workers that have been silent for too long."""
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            for job in [job for job in (*self._running(), *self._line) if now > job.deadline]:
                self.cancel(job, DeadlineExceeded(self._request_timeout))
            for supervisor in self._supervisors:
                supervisor.kill_if_silent(self._step_timeout)

    def _running(self) -> list[Job]:
        return [job for supervisor in self._supervisors for job in supervisor.running.values()]

    def _workers(self) -> int:
        """Those that share the line; at least 1."""
        return max(1, sum(supervisor.ready for supervisor in self._supervisors))

    def _seconds(self, jobs: Sequence[Job]) -> float:
        return sum(self.cost_model.seconds(job.request, job.left) for job in jobs)

    def _dispatch(self) -> None:
        """Send what may run to the workers, and tell the others where they stand."""
        while self._line and (supervisor := self._free_for(self._line[0])) is not None:
            supervisor.run(self._line.popleft())
        self._tell_positions()

    def _free_for(self, job: Job) -> WorkerSupervisor | None:
        """The worker with the least work, of those with a place. A job that has seen a worker die runs alone."""
        free = [
            supervisor
            for supervisor in self._supervisors
            if supervisor.ready
            and len(supervisor.running) < (1 if job.crashes else self._max_running)
            and not any(other.crashes for other in supervisor.running.values())
        ]
        return min(free, key=lambda supervisor: self._seconds([*supervisor.running.values()]), default=None)

    def _tell_positions(self) -> None:
        """Tell every waiting job where it stands, if that is news."""
        ahead = self._seconds(self._running())
        for position, job in enumerate(self._line):
            ahead += self.cost_model.seconds(job.request)
            told = job.channel.latest()
            if told is None or told.stage != "queued" or told.position != position:
                job.publish(Progress("queued", position=position, eta=ahead / self._workers()))

    def _progress(self, supervisor: WorkerSupervisor, job: Job, stage: str, image: int, step: int) -> Progress:
        """Of a worker's jobs the shortest goes first, so each has to wait for those that are not longer."""
        left = [self._seconds([other]) for other in supervisor.running.values()]
        own, steps = self._seconds([job]), job.request.steps
        return Progress(stage, image, step, steps, eta=sum(other for other in left if other <= own))

    def _collect(self, job: Job, timings: dict[str, float], notes: list[str]) -> ImageResult:
        queued = (job.dispatched or job.admitted) - job.admitted
        pixels = tuple(job.pixels[index] for index in range(len(job.request.seeds)))
        timings["queue"] += queued
        return ImageResult(job.request, pixels, Timings(**timings), tuple(notes))

    def _end(self, supervisor: WorkerSupervisor, job: Job, outcome: ImageResult | PipelineError) -> None:
        supervisor.release(job)
        job.finish(outcome)
        self._dispatch()


def said(worker: WorkerStatus, alone: bool) -> str:
    """Why a worker is not there; with its device, where there are several."""
    return worker.failure or "" if alone else f"{worker.device}: {worker.failure}"
