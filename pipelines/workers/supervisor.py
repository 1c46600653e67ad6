"""Keeps a worker process alive on one device. No torch.

The supervisor starts a worker, sends it jobs, and restarts it when it dies; the jobs of a dead worker go back to the
pool. A worker that cannot load its engine the first time is not restarted: the cause is a wrong file or device.
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
    """Receives what happens to a supervisor's worker and jobs."""

    cost_model: CostModel

    def on_ready(self, supervisor: "WorkerSupervisor", info: EngineInfo) -> None: ...

    def on_failed(self, supervisor: "WorkerSupervisor") -> None: ...

    def requeue(self, jobs: list[Job]) -> None:
        """The worker died while it had these jobs, in the order in which it received them."""
        ...

    def on_job_message(self, supervisor: "WorkerSupervisor", job: Job, event: str, message: Message) -> None: ...


class WorkerSupervisor:
    """Keeps a worker alive on the device that `config` names. `running` holds its jobs by id."""

    def __init__(self, config: EngineConfig, callbacks: SupervisorCallbacks) -> None:
        self.device = config.device
        self.running: dict[str, Job] = {}
        self.failed = False
        self.failure: str | None = None
        self._config, self._environment = isolate_devices(config, os.environ)
        self._callbacks = callbacks
        self._process: WorkerProcess | None = None
        self._started = time.monotonic()
        self._was_ready = False
        self._device_name: str | None = None  # of the first worker that was ready
        self._stopping = False
        self._restarts = 0
        self._backoff = 0.0

    @property
    def ready(self) -> bool:
        return self._process is not None and self._process.info is not None and not self.failed

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

    def fail(self, reason: str) -> None:
        """Stop the worker and start no other one."""
        self.failed, self.failure = True, reason
        if self._process is not None:
            self._process.kill()
        self._callbacks.on_failed(self)

    def run(self, job: Job) -> None:
        assert self._process is not None
        job.dispatched = time.monotonic()
        self.running[job.id] = job
        run = {"op": "run", "job": job.id, "tenant": job.tenant, "request": job.request.to_json()}
        run["previews"] = asdict(job.previews)
        self._process.send(run, job.request.source.pixels if job.request.source else b"")

    def count(self, tenant: str) -> int:
        """How many of its jobs are a tenant's."""
        return sum(job.tenant == tenant for job in self.running.values())

    def cancel(self, job: Job) -> None:
        if self.running.pop(job.id, None) is not None and self._process is not None:
            self._process.send({"op": "cancel", "job": job.id})

    def release(self, job: Job) -> None:
        """Forget a job that has ended. It shows that the worker works, so its next restart is immediate."""
        del self.running[job.id]
        self._backoff = 0.0

    def kill_if_unresponsive(self, limit: float) -> None:
        """Kill a worker that has jobs and has sent nothing for `limit` seconds."""
        if self.running and self._process is not None:
            last_sign = max(self._process.last_message_at, *(job.dispatched or 0.0 for job in self.running.values()))
            if time.monotonic() - last_sign > limit:
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
            eta=self._callbacks.cost_model.estimate_load_seconds(time.monotonic() - self._started, process.progress)
            if loading and process
            else 0.0,
            pid=process.pid if process is not None else None,
            running=len(self.running),
            restarts=self._restarts,
            failure=self.failure,
        )

    def _state(self) -> str:
        if self.failed:
            return "failed"
        if self.ready:
            return "ready"
        return "restarting" if self._was_ready else "loading"

    def _on_event(self, process: WorkerProcess, message: Message) -> None:
        header = message.header
        match header["event"]:
            case "loading":
                process.stage, process.progress = header["stage"], header["progress"]
            case "load_failed":
                self.failure = header["message"]
                if not self._was_ready:  # a worker that was ready before is restarted
                    self.fail(header["message"])
            case "ready":
                seconds, again = time.monotonic() - self._started, self._was_ready
                self._callbacks.cost_model.record_load(seconds)
                process.stage, process.progress = "ready", 1.0
                process.info = EngineInfo(**{key: header[key] for key in EngineInfo.__slots__})
                self._was_ready, self.failure = True, None
                if self._keep_device(process.info):
                    self._callbacks.on_ready(self, process.info)
                if again and self.ready:
                    log.info("worker_ready", device=self.device, pid=process.pid, seconds=round(seconds, 1))
            case event if (job := self.running.get(header["job"])) is not None:
                self._callbacks.on_job_message(self, job, event, message)

    def _keep_device(self, info: EngineInfo) -> bool:
        """Whether a worker is on the device of the first one. What `auto` meant then it means for all later ones."""
        if self._device_name is None:
            self._device_name = info.device
            if self._config.device == "auto" and info.device_type:
                self._config = replace(self._config, device=info.device_type)
        elif info.device != self._device_name:
            self.fail(f"the device has changed from {self._device_name} to {info.device}: start the server again")
            return False
        return True

    def _on_death(self, process: WorkerProcess) -> None:
        jobs = list(self.running.values())
        self.running.clear()
        self._process = None
        if not (self._stopping or self.failed):
            self._restarts += 1
            log.warning("worker_died", device=self.device, pid=process.pid)
            loop = asyncio.get_running_loop()
            loop.call_later(self._backoff, lambda: asyncio.ensure_future(self.start()))
            self._backoff = min(MAX_BACKOFF, self._backoff * 2 + 1)
        self._callbacks.requeue(jobs)


def isolate_devices(config: EngineConfig, environment: Mapping[str, str]) -> tuple[EngineConfig, dict[str, str]]:
    """The worker's configuration and environment, with which it sees only its own numbered CUDA devices.

    A fault of another device, or a library that takes the first device it finds, then cannot affect the worker. A
    device that `CUDA_VISIBLE_DEVICES` hides stays hidden; the variable set to an empty value hides all.
    """
    indices = [device.removeprefix("cuda:") for device in config.device.split("+")]
    if not all(index.isdecimal() for index in indices):
        return config, dict(environment)
    names = indices
    if (visible := environment.get(VISIBLE)) is not None:
        listed = [name for name in visible.split(",") if name]
        names = [listed[int(index)] if int(index) < len(listed) else "none" for index in indices]
    device = "+".join(f"cuda:{index}" for index in range(len(names))) if len(names) > 1 else "cuda"
    return replace(config, device=device), {**environment, VISIBLE: ",".join(names)}
