"""The bounded line and the worker processes behind it. No torch.

A request is refused before any work or it is accepted, and then it ends in exactly one of: its images, an error of
its own, its deadline, its caller's cancel. A worker's death loses nothing: its jobs go back to the head of the line
and run again, each alone, so that one which kills its worker a second time is known and fails by itself.
"""

import asyncio
import secrets
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.child import Child
from pipelines.engine import EngineConfig, EngineInfo
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
from pipelines.frames import Frame
from pipelines.job import Job, Preview, PreviewPlan, Progress
from pipelines.pace import Pace
from pipelines.request import ImageRequest, ImageResult, Timings

MAX_CRASHES = 2
MAX_BACKOFF = 30.0  # seconds between restarts of a worker that will not come up


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What the pool is doing. `state` is `loading`, `ready`, `restarting`, `failed` or `draining`."""

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


class WorkerPool:
    """One line of jobs in front of one worker process."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        queue_size: int = 64,
        max_running: int = 16,
        request_timeout: float = 600.0,
        step_timeout: float = 120.0,
    ) -> None:
        self._config = config
        self._queue_size = queue_size
        self._max_running = max_running
        self._request_timeout = request_timeout
        self._step_timeout = step_timeout
        self._line: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._child: Child | None = None
        self._pace = Pace()
        self._restarts = 0
        self._backoff = 0.0
        self._draining = False
        self._info: EngineInfo | None = None
        self.failed = asyncio.Event()  # set when the engine cannot be loaded: a wrong file, not a passing fault
        self._failure: str | None = None

    # --- for the caller -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Spawn the worker. Returns at once; `status()` follows the loading."""
        self._started = time.monotonic()
        self._watchdog = asyncio.create_task(self._watch())
        await self._spawn()

    async def stop(self) -> None:
        """Stop the worker; what is unfinished ends as `Draining`."""
        self._draining = True
        self._watchdog.cancel()
        for job in (*self._running.values(), *self._line):
            job.finish(Draining())
        self._line.clear()
        if self._child is not None:
            await self._child.stop()

    def drain(self) -> None:
        """Take no new work; what was accepted goes on."""
        self._draining = True

    def submit(self, request: ImageRequest, previews: PreviewPlan = PreviewPlan()) -> Job:  # noqa: B008 - frozen
        """Put a request in the line. Raises `NotReady`, `Draining` or `QueueFull`, before any work."""
        if self._draining:
            raise Draining
        if self._info is None:
            status = self.status()
            raise NotReady(status.stage, status.progress, status.eta)
        if len(self._line) + len(self._running) >= self._queue_size + self._max_running:
            raise QueueFull(len(self._line), self.seconds_ahead())
        job = Job(secrets.token_hex(16), request, deadline=time.monotonic() + self._request_timeout, previews=previews)
        self._line.append(job)
        self._dispatch()
        return job

    def cancel(self, job: Job, reason: PipelineError | None = None) -> None:
        """End a job; its work stops within one step. Finished jobs stay as they are."""
        if job.finished:
            return
        job.finish(reason or Cancelled())
        if self._running.pop(job.id, None) is not None and self._child is not None:
            self._child.send({"op": "cancel", "job": job.id})
        elif job in self._line:
            self._line.remove(job)
        self._dispatch()

    def seconds_ahead(self) -> float:
        """Predicted seconds of work before a request that arrives now would start."""
        return sum(self._pace.seconds(job.request, job.left) for job in (*self._running.values(), *self._line))

    def status(self) -> PoolStatus:
        child = self._child
        loading = child is not None and child.info is None
        return PoolStatus(
            state=self._state(),
            stage=child.stage if child is not None else "starting",
            progress=child.progress if loading and child else 1.0,
            eta=self._pace.load_left(time.monotonic() - self._started, child.progress) if loading and child else 0.0,
            waiting=len(self._line),
            running=len(self._running),
            restarts=self._restarts,
            worker_pids=(child.pid,) if child is not None else (),
            info=self._info,
            failure=self._failure,
        )

    def _state(self) -> str:
        if self._draining:
            return "draining"
        if self.failed.is_set():
            return "failed"
        if self._child is not None and self._child.info is not None:
            return "ready"
        return "loading" if self._info is None else "restarting"

    # --- the worker's life --------------------------------------------------------------------------------------

    async def _spawn(self) -> None:
        self._started = time.monotonic()
        self._child = Child(self._config, self._on_event)
        await self._child.start(self._on_death)

    def _on_death(self, child: Child) -> None:
        """Give its jobs back to the line and start another. Suspects run alone (see `_dispatch`)."""
        for job in reversed(self._running.values()):
            job.crashes += 1
            job.pixels.clear()
            job.left = 1.0
            if job.crashes < MAX_CRASHES:
                self._line.appendleft(job)
            else:
                job.finish(WorkerCrashed())
        self._running.clear()
        self._child = None
        self._tell_positions()
        if self._draining or self.failed.is_set():
            return
        self._restarts += 1
        print(f"srpo: the worker (pid {child.pid}) died and is started again", file=sys.stderr, flush=True)
        asyncio.get_running_loop().call_later(self._backoff, lambda: asyncio.ensure_future(self._respawn()))
        self._backoff = min(MAX_BACKOFF, self._backoff * 2 + 1)

    async def _respawn(self) -> None:
        if not self._draining:
            await self._spawn()

    async def _watch(self) -> None:
        """End jobs past their deadline, and kill a worker that has been silent for too long."""
        while True:
            await asyncio.sleep(0.1)
            now = time.monotonic()
            for job in [job for job in (*self._running.values(), *self._line) if now > job.deadline]:
                self.cancel(job, DeadlineExceeded(self._request_timeout))
            if self._running and self._child is not None and now - self._silent_since() > self._step_timeout:
                print(f"srpo: no step for {self._step_timeout:.0f} s: killing the worker", file=sys.stderr, flush=True)
                self._child.kill()

    def _silent_since(self) -> float:
        assert self._child is not None
        return max(self._child.last_heard, *(job.dispatched or 0.0 for job in self._running.values()))

    # --- jobs ---------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send what may run to the worker, and tell the others where they stand."""
        self._send_next()
        self._tell_positions()

    def _send_next(self) -> None:
        """A job that has seen a worker die runs alone."""
        child = self._child
        if child is None or child.info is None:
            return
        while self._line and len(self._running) < self._max_running:
            suspect = self._line[0].crashes > 0 or any(job.crashes for job in self._running.values())
            if suspect and self._running:
                return
            job = self._line.popleft()
            job.dispatched = time.monotonic()
            self._running[job.id] = job
            child.send({"op": "run", "job": job.id, "request": job.request.to_json(), "previews": asdict(job.previews)})

    def _tell_positions(self) -> None:
        """Tell every waiting job where it stands, if that is news."""
        ahead = sum(self._pace.seconds(job.request, job.left) for job in self._running.values())
        for position, job in enumerate(self._line):
            ahead += self._pace.seconds(job.request)
            told = job.channel.latest()
            if told is None or told.stage != "queued" or told.position != position:
                job.publish(Progress("queued", position=position, eta=ahead))

    def _progress(self, job: Job, stage: str, image: int, step: int) -> Progress:
        """Of the running jobs the shortest goes first, so each has to wait for those that are not longer."""
        own = self._pace.seconds(job.request, job.left)
        left = [self._pace.seconds(other.request, other.left) for other in self._running.values()]
        steps = job.request.num_inference_steps
        return Progress(stage, image, step, steps, eta=sum(other for other in left if other <= own))

    def _on_event(self, child: Child, frame: Frame) -> None:
        header = frame.header
        match header["event"]:
            case "loading":
                child.stage, child.progress = header["stage"], header["progress"]
            case "load_failed":
                self._failure = header["message"]
                if self._info is None:  # it never worked; a reload that fails is tried again
                    self.failed.set()
            case "ready":
                self._pace.loaded(time.monotonic() - self._started)
                child.stage, child.progress = "ready", 1.0
                child.info = self._info = EngineInfo(**{key: header[key] for key in EngineInfo.__slots__})
                self._dispatch()
            case event if (job := self._running.get(header["job"])) is not None:
                self._on_job_event(job, event, frame)

    def _on_job_event(self, job: Job, event: str, frame: Frame) -> None:
        header: dict[str, Any] = frame.header
        match event:
            case "step":
                job.left = header["left"]
                job.publish(self._progress(job, header["stage"], header["image"], header["step"]))
            case "preview":
                size = (header["width"], header["height"])
                job.publish(Preview(header["image"], header["index"], *size, frame.payload))
            case "image":
                job.pixels[header["image"]] = frame.payload
            case "done":
                self._end(job, self._collect(job, header["timings"], header["notes"]))
                self._pace.drawn(job.request, header["timings"])
                self._backoff = 0.0
            case "failed":
                self._end(job, FAILURES[header["error"]]())

    def _collect(self, job: Job, timings: dict[str, float], notes: list[str]) -> ImageResult:
        queued = (job.dispatched or job.admitted) - job.admitted
        pixels = tuple(job.pixels[index] for index in range(len(job.request.seeds)))
        timings["queue"] += queued
        return ImageResult(job.request, pixels, Timings(**timings), tuple(notes))

    def _end(self, job: Job, outcome: ImageResult | PipelineError) -> None:
        del self._running[job.id]
        job.finish(outcome)
        self._dispatch()
