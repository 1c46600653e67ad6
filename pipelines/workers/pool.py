"""A bounded queue of jobs and the workers that take them, one worker for each device. No torch.

A request is either refused before any work or accepted. An accepted job ends in exactly one of these: its images, an
error of its own, its deadline, or its caller's cancellation. A worker's death loses nothing: its jobs are requeued at
the head and run again, those of the step that died one at a time, so that a job which kills its worker twice is
identified and fails alone. All workers produce the same bytes, so it does not matter which of them runs a job.
"""

import asyncio
import secrets
import time
from collections.abc import Sequence

import structlog

from pipelines.duties import keep_running
from pipelines.engine.base import EngineInfo
from pipelines.errors import (
    FAILURES,
    Cancelled,
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    ImageTooLarge,
    NotReady,
    PipelineError,
    WorkerCrashed,
    WorkersSuspended,
)
from pipelines.job import EventChannel, Job, Preview, PreviewPlan, Progress
from pipelines.queueing.cost_model import CostModel
from pipelines.queueing.refusals import Refusals
from pipelines.request import ImageRequest, ImageResult
from pipelines.workers.dispatcher import Dispatcher
from pipelines.workers.idleness import IdleRelease
from pipelines.workers.observer import PoolObserver
from pipelines.workers.protocol import ImageReady, JobDone, JobEvent, JobFailed, PreviewReady, StepDone
from pipelines.workers.status import PoolState, PoolStatus, join_failures
from pipelines.workers.supervision import EngineSupervisor, Supervise

MAX_CRASHES = 2
log = structlog.get_logger("srpo")


class WorkerPool:
    """One queue of jobs for all engines that `supervise` keeps alive: `local_workers`, or those of a cluster."""

    def __init__(
        self,
        supervise: Supervise,
        *,
        queue_size: int = 64,
        max_running: int = 16,
        request_timeout: float = 600.0,
        idle_release: float | None = None,
    ) -> None:
        """`idle_release`: seconds without a request, after which the workers sleep until the next one."""
        self.cost_model = CostModel()
        self.observer = PoolObserver()  # may be replaced before the pool starts
        self.failed = asyncio.Event()  # set when no engine can be loaded: a wrong file, not a passing fault
        self.supervisors = supervise(self)  # one a device, to be looked at
        self.capacity = queue_size + max_running * len(self.supervisors)
        self._request_timeout = request_timeout
        self.idleness = IdleRelease(self.supervisors, idle_release, lambda: any(self._dispatcher.unfinished()))
        self._dispatcher = Dispatcher(self.supervisors, self.cost_model, max_running, self.idleness)
        self._queue = self._dispatcher.waiting
        self._draining = False
        self._refusals = Refusals()
        self._info: EngineInfo | None = None

    # --- for the caller -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Spawn the workers. Returns at once; `status()` follows the loading."""
        duties = {"deadlines": self._watch_deadlines, "workers": self._watch_workers}
        self._watching = [asyncio.create_task(keep_running(name, duty)) for name, duty in duties.items()]
        for supervisor in self.supervisors:
            await supervisor.start()

    async def stop(self) -> None:
        """Stop the workers. Unfinished jobs end with `Draining`."""
        self._draining = True
        for task in self._watching:
            task.cancel()
        self._give_up()
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors))

    def drain(self) -> None:
        """Accept no new jobs; accepted ones are finished."""
        self._draining = True

    @property
    def has_room(self) -> bool:
        """Whether a place is free. Unlike a refusal, the question promises nobody one."""
        return len(self._queue) + len(self._dispatcher.running()) < self.capacity

    def check_capacity(self) -> None:
        """Raise what `submit` would raise now: `NotReady`, `WorkersSuspended`, `Draining` or `QueueFull`."""
        if self._draining:
            raise Draining
        suspended = [supervisor.suspended or supervisor.failed for supervisor in self.supervisors]
        if all(suspended) and not self.failed.is_set():
            raise WorkersSuspended(self.status().eta)
        if self._info is None or self.failed.is_set():
            status = self.status()
            raise NotReady(status.stage, status.progress, status.eta)
        if not self.has_room:
            raise self._refusals.error(self.estimate_wait(), self._dispatcher.running(), len(self._queue))

    def submit(
        self,
        request: ImageRequest,
        previews: PreviewPlan = PreviewPlan(),  # noqa: B008 - frozen
        channel: EventChannel | None = None,
        tenant: str = "",
    ) -> Job:
        """Add a request of `tenant`'s to the queue. Raises `ImageTooLarge` or as `check_capacity` does, before work.

        The job's events go to `channel`, which the caller closes; without one, to a channel of the job's own.
        """
        self.check_capacity()
        self._check_size(request)
        job = Job(
            secrets.token_hex(16),
            request,
            deadline=time.monotonic() + self._request_timeout,
            previews=previews,
            tenant=tenant,
            channel=channel or EventChannel(),
            owns_channel=channel is None,
        )
        self._queue.append(job)
        self.idleness.wake()
        self._dispatcher.dispatch()
        return job

    def _check_size(self, request: ImageRequest) -> None:
        limit = self._info.max_pixels if self._info else None
        if limit is not None and request.pixels > limit:
            raise ImageTooLarge(request.width, request.height, limit)

    def cancel(self, job: Job, reason: PipelineError | None = None) -> None:
        """End a job; its work stops within one step. Finished jobs stay as they are."""
        if job.finished:
            return
        job.finish(reason or Cancelled())
        for supervisor in self.supervisors:
            supervisor.cancel(job)
        if job in self._queue:
            self._queue.remove(job)
        self._dispatcher.dispatch()

    def unfinished_of(self, tenant: str) -> list[Job]:
        """A tenant's jobs, those that run first."""
        return [job for job in self._dispatcher.unfinished() if job.tenant == tenant]

    def estimate_end(self, jobs: Sequence[Job]) -> float:
        """Predicted seconds until the first of a tenant's `jobs` ends, where tenants take turns."""
        return self._dispatcher.estimate_end(jobs)

    def estimate_wait(self) -> float:
        """Predicted seconds of work before a request that arrives now would start."""
        return self._dispatcher.estimate_wait()

    def status(self) -> PoolStatus:
        workers = tuple(supervisor.status() for supervisor in self.supervisors)
        state = self._state()
        best = max(workers, key=lambda worker: (worker.state == "ready", worker.state != "failed", worker.progress))
        return PoolStatus(
            state=state,
            stage=best.stage,
            progress=best.progress,
            eta=best.eta,
            waiting=len(self._queue),
            running=len(self._dispatcher.running()),
            restarts=sum(worker.restarts for worker in workers),
            worker_pids=tuple(worker.pid for worker in workers if worker.pid is not None),
            info=self._info,
            failure=join_failures(workers),
            workers=workers,
        )

    def _state(self) -> PoolState:
        if self._draining:
            return "draining"
        if self.failed.is_set():
            return "failed"
        if any(supervisor.ready for supervisor in self.supervisors):
            return "ready"
        if self.idleness.waking:
            return "waking"
        if self.idleness.asleep:
            return "asleep"
        if any(supervisor.suspended for supervisor in self.supervisors):
            return "suspended"
        return "loading" if self._info is None else "restarting"

    # --- for the supervisors ------------------------------------------------------------------------------------

    def on_ready(self, supervisor: EngineSupervisor, info: EngineInfo) -> None:
        """Dispatch to the worker, unless it would produce other bytes than the workers that are already ready."""
        others = any(other.ready for other in self.supervisors if other is not supervisor)
        if others and self._info is not None and info.fingerprint != self._info.fingerprint:
            supervisor.fail(
                f"{info.device} (fingerprint {info.fingerprint}) draws other bytes than {self._info.device} "
                f"({self._info.fingerprint}): serve unlike devices with a server each"
            )
            return
        self._info = info
        self.idleness.begin()
        self._dispatcher.dispatch()

    def on_failed(self, supervisor: EngineSupervisor) -> None:
        if all(other.failed for other in self.supervisors):
            self.failed.set()
            self._give_up()
        else:
            log.error("worker_failed", device=supervisor.device, reason=supervisor.failure)

    def _give_up(self) -> None:
        """Nobody here draws any more: what is unfinished, another pool may carry out."""
        for job in [*self._dispatcher.unfinished()]:
            job.finish(Draining())
        self._queue.clear()

    def requeue(self, jobs: list[Job], suspects: frozenset[str]) -> None:
        """Put the jobs of a dead worker back at the head of the queue.

        Those that were in the step that died are suspects, and run last and alone (`Dispatcher`). The death counts
        against a job that was alone in it: a worker that is killed from outside must not fail its jobs.
        """
        for job in jobs:
            job.pixels.clear()
            job.remaining_fraction = 1.0
            if job.id in suspects:
                job.suspect = True
                job.crashes += len(suspects) == 1
            if job.crashes < MAX_CRASHES:
                self._queue.put_again(job)
            else:
                job.finish(WorkerCrashed())
        self._dispatcher.dispatch()

    def on_job_event(self, supervisor: EngineSupervisor, job: Job, event: JobEvent) -> None:
        match event:
            case StepDone():
                job.remaining_fraction = event.remaining_fraction
                eta = self._dispatcher.estimate_left(supervisor, job)
                job.publish(Progress(event.stage, event.image, event.step, job.request.steps, eta=eta))
                if event.stage == "denoise":
                    self.observer.step_taken(job.request, event.step, event.seconds, event.batch)
            case PreviewReady():
                job.publish(Preview(event.image, event.index, event.width, event.height, event.pixels))
            case ImageReady():
                job.pixels[event.image] = event.pixels
            case JobDone():
                self._finish_job(supervisor, job, job.build_result(event.timings, event.stages, event.notes))
                self.cost_model.record_job(job.request, event.timings)
            case JobFailed():
                self._finish_job(supervisor, job, FAILURES.get(event.error, GenerationFailed)())

    async def _watch_deadlines(self) -> None:
        """Cancel jobs that are past their deadline."""
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            for job in [job for job in self._dispatcher.unfinished() if now > job.deadline]:
                self.cancel(job, DeadlineExceeded(self._request_timeout))

    async def _watch_workers(self) -> None:
        while True:
            await asyncio.sleep(min(supervisor.watch_interval for supervisor in self.supervisors))
            for supervisor in self.supervisors:
                supervisor.watch()
            self.idleness.look()
            self._dispatcher.publish_waking()

    def _finish_job(self, supervisor: EngineSupervisor, job: Job, outcome: ImageResult | PipelineError) -> None:
        supervisor.release(job)
        job.finish(outcome)
        self._dispatcher.dispatch()
