"""One device and its worker process, over all the deaths of that process. No torch.

It starts a worker, hands it jobs, and starts another when it dies; what the worker was doing goes back to the pool.
A worker that has never come up is given up, with the reason: a wrong file or device, not a passing fault.
"""

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import structlog

from pipelines.engine.base import EngineConfig, EngineInfo
from pipelines.job import Job
from pipelines.workers.cost_model import CostModel
from pipelines.workers.process import WorkerProcess
from pipelines.workers.protocol import Message

MAX_BACKOFF = 30.0  # seconds between restarts of a worker that will not come up
VISIBLE = "CUDA_VISIBLE_DEVICES"
log = structlog.get_logger("srpo")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One device's worker. `state` is `loading`, `ready`, `restarting` or `failed`."""

    device: str
    state: str
    stage: str
    progress: float
    eta: float
    pid: int | None
    running: int
    restarts: int
    failure: str | None


class SupervisorCallbacks(Protocol):
    """What a supervisor reports to."""

    cost_model: CostModel

    def on_ready(self, supervisor: "WorkerSupervisor", info: EngineInfo) -> None: ...

    def on_given_up(self, supervisor: "WorkerSupervisor") -> None: ...

    def on_orphans(self, jobs: list[Job]) -> None:
        """The worker has died with these jobs on it, in the order in which they were given."""
        ...

    def on_job_event(self, supervisor: "WorkerSupervisor", job: Job, event: str, message: Message) -> None: ...


class WorkerSupervisor:
    """Keeps a worker alive on the device that `config` names. `running` holds its jobs by id."""

    def __init__(self, config: EngineConfig, callbacks: SupervisorCallbacks) -> None:
        self.device = config.device
        self.running: dict[str, Job] = {}
        self.given_up = False
        self.failure: str | None = None
        self._config, self._environment = see_only(config, os.environ)
        self._callbacks = callbacks
        self._process: WorkerProcess | None = None
        self._started = time.monotonic()
        self._came_up = False
        self._stopping = False
        self._restarts = 0
        self._backoff = 0.0

    @property
    def ready(self) -> bool:
        return self._process is not None and self._process.info is not None and not self.given_up

    async def start(self) -> None:
        """Spawn a worker. Returns at once; `status()` follows the loading."""
        if not self._stopping:
            self._started = time.monotonic()
            self._process = WorkerProcess(self._config, self._on_event, self._environment)
            await self._process.start(self._on_death)

    async def stop(self) -> None:
        self._stopping = True
        if self._process is not None:
            await self._process.stop()

    def give_up(self, reason: str) -> None:
        """Start no other worker here."""
        self.given_up, self.failure = True, reason
        if self._process is not None:
            self._process.kill()
        self._callbacks.on_given_up(self)

    def run(self, job: Job) -> None:
        assert self._process is not None
        job.dispatched = time.monotonic()
        self.running[job.id] = job
        run = {"op": "run", "job": job.id, "request": job.request.to_json(), "previews": asdict(job.previews)}
        self._process.send(run, job.request.source.pixels if job.request.source else b"")

    def cancel(self, job: Job) -> None:
        if self.running.pop(job.id, None) is not None and self._process is not None:
            self._process.send({"op": "cancel", "job": job.id})

    def release(self, job: Job) -> None:
        """The job has ended: the worker works."""
        del self.running[job.id]
        self._backoff = 0.0

    def kill_if_silent(self, limit: float) -> None:
        """End a worker that has jobs and has not been heard of for `limit` seconds."""
        if self.running and self._process is not None:
            heard = max(self._process.last_heard, *(job.dispatched or 0.0 for job in self.running.values()))
            if time.monotonic() - heard > limit:
                log.error("worker_silent", device=self.device, pid=self._process.pid, seconds=limit)
                self._process.kill()

    def status(self) -> WorkerStatus:
        process = self._process
        loading = process is not None and process.info is None
        return WorkerStatus(
            device=self.device,
            state=self._state(),
            stage=process.stage if process is not None else "starting",
            progress=process.progress if loading and process else 1.0,
            eta=self._callbacks.cost_model.load_left(time.monotonic() - self._started, process.progress)
            if loading and process
            else 0.0,
            pid=process.pid if process is not None else None,
            running=len(self.running),
            restarts=self._restarts,
            failure=self.failure,
        )

    def _state(self) -> str:
        if self.given_up:
            return "failed"
        if self.ready:
            return "ready"
        return "restarting" if self._came_up else "loading"

    def _on_event(self, process: WorkerProcess, message: Message) -> None:
        header = message.header
        match header["event"]:
            case "loading":
                process.stage, process.progress = header["stage"], header["progress"]
            case "load_failed":
                self.failure = header["message"]
                if not self._came_up:  # it never worked; a reload that fails is tried again
                    self.give_up(header["message"])
            case "ready":
                seconds, again = time.monotonic() - self._started, self._came_up
                self._callbacks.cost_model.loaded(seconds)
                process.stage, process.progress = "ready", 1.0
                process.info = EngineInfo(**{key: header[key] for key in EngineInfo.__slots__})
                self._came_up, self.failure = True, None
                self._callbacks.on_ready(self, process.info)
                if again and self.ready:
                    log.info("worker_ready", device=self.device, pid=process.pid, seconds=round(seconds, 1))
            case event if (job := self.running.get(header["job"])) is not None:
                self._callbacks.on_job_event(self, job, event, message)

    def _on_death(self, process: WorkerProcess) -> None:
        orphans = list(self.running.values())
        self.running.clear()
        self._process = None
        if not (self._stopping or self.given_up):
            self._restarts += 1
            log.warning("worker_died", device=self.device, pid=process.pid)
            loop = asyncio.get_running_loop()
            loop.call_later(self._backoff, lambda: asyncio.ensure_future(self.start()))
            self._backoff = min(MAX_BACKOFF, self._backoff * 2 + 1)
        self._callbacks.on_orphans(orphans)


def see_only(config: EngineConfig, environment: Mapping[str, str]) -> tuple[EngineConfig, dict[str, str]]:
    """Numbered CUDA devices are all that their worker sees: a fault of another one, or a library that takes the first
    it finds, cannot reach it. A number that `CUDA_VISIBLE_DEVICES` hides stays hidden: set but empty, it hides all.
    Returns what the worker is told, and its environment."""
    numbers = [device.removeprefix("cuda:") for device in config.device.split("+")]
    if not all(number.isdecimal() for number in numbers):
        return config, dict(environment)
    names = numbers
    if (visible := environment.get(VISIBLE)) is not None:
        listed = [name for name in visible.split(",") if name]
        names = [listed[int(each)] if int(each) < len(listed) else "none" for each in numbers]
    device = "+".join(f"cuda:{index}" for index in range(len(names))) if len(names) > 1 else "cuda"
    return replace(config, device=device), {**environment, VISIBLE: ",".join(names)}
