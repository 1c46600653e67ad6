"""Keeps a worker process alive on one device. No torch.

The supervisor starts a worker, sends it jobs and pings, kills it when it is silent or does not get on (`patience.py`),
and restarts it when it dies; the jobs of a dead worker go back to the pool. A worker that cannot be spawned counts as
dead. One that cannot load its engine the first time is not restarted: the cause is a wrong file or device.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import structlog

from pipelines.engine.base import EngineConfig, EngineInfo
from pipelines.job import Job
from pipelines.workers.activity import IDLE, ActivityReport
from pipelines.workers.patience import Patience, Restarts
from pipelines.workers.process import WorkerProcess
from pipelines.workers.protocol import Message, decode_event, known_fields
from pipelines.workers.status import WorkerState, WorkerStatus
from pipelines.workers.supervision import Supervise, SupervisorCallbacks
from pipelines.workers.visible_devices import isolate_devices

log = structlog.get_logger("srpo")


class WorkerSupervisor:
    """Keeps a worker alive on the device that `config` names. `running` holds its jobs by id."""

    def __init__(
        self,
        config: EngineConfig,
        callbacks: SupervisorCallbacks,
        patience: Patience = Patience(),  # noqa: B008
    ) -> None:
        self.device = config.device
        self.running: dict[str, Job] = {}
        self.failure: str | None = None
        self._config, self._environment = isolate_devices(config, os.environ)
        self._callbacks = callbacks
        self._process: WorkerProcess | None = None
        self._state: WorkerState = "loading"
        self._started = time.monotonic()
        self._device_name: str | None = None  # of the first worker that was ready; until then None
        self._restarts = 0
        self._restarting: asyncio.Task[None] | None = None
        self._patience = patience
        self._deaths = Restarts(patience)
        self._pace: dict[str, float] = {}  # seconds of one unit of each kind of work, the slowest of all workers

    @property
    def watch_interval(self) -> float:
        return self._patience.interval

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    @property
    def failed(self) -> bool:
        return self._state == "failed"

    @property
    def suspended(self) -> bool:
        """Whether workers died so often that no work should be taken until one is ready."""
        return self._state == "suspended"

    @property
    def state(self) -> WorkerState:
        return self._state

    def _move_to(self, state: WorkerState) -> None:
        """The one place where the state changes. What has failed can only be stopped, and what is stopped stays so."""
        if self._state != "stopped" and (self._state != "failed" or state == "stopped"):
            self._state = state

    @property
    def seconds_to_ready(self) -> float:
        """Predicted, from now on, or from being woken on."""
        process, cost_model = self._process, self._callbacks.cost_model
        if self.ready:
            return 0.0
        if process is not None and process.info is None:
            return cost_model.estimate_load_seconds(time.monotonic() - self._started, process.progress)
        if self._state in ("asleep", "waking"):
            return cost_model.estimate_load_seconds(0.0, 0.0)
        return self._deaths.seconds_left if process is None else 0.0

    @property
    def silence(self) -> float:
        """Seconds since the worker was heard of; 0 where there is none."""
        return self._process.heartbeat.silent if self._process is not None else 0.0

    @property
    def report(self) -> ActivityReport:
        """What the worker said last of its work."""
        return self._process.heartbeat.report if self._process is not None else IDLE

    async def start(self) -> None:
        """Spawn a worker. Returns at once; `status()` follows the loading."""
        self._started = time.monotonic()
        process = WorkerProcess(self._config, self._environment, self._on_event, self._on_condemned)
        try:
            await process.start(self._on_death)
        except OSError as error:
            self.failure = f"no worker process could be started: {error.strerror or type(error).__name__}"
            log.error("worker_not_started", device=self.device, reason=self.failure)
            self._restart_later()
        else:
            self._process = process

    async def stop(self) -> None:
        self._move_to("stopped")
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait([self._restarting])
        if self._process is not None:
            await self._process.stop()

    def sleep(self) -> None:
        """End the worker, which has no jobs, until `wake`. Its device's memory is free when it is reaped."""
        assert self._process is not None
        assert not self.running
        self._move_to("asleep")
        self._process.kill()

    def wake(self) -> None:
        """Start a worker in the place of the one that was ended. Returns at once."""
        self._move_to("waking")
        if self._process is None:  # else it is about to be reaped, and is followed then
            self._start_after(0.0)

    def fail(self, reason: str) -> None:
        """Stop the worker and start no other one."""
        self._move_to("failed")
        self.failure = reason
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
        self._deaths.forgive()

    def watch(self) -> None:
        """Ping the worker, and kill it if it has been silent or busy for too long. Call it at intervals."""
        process = self._process
        if process is None or process.condemned:
            return
        heartbeat, patience = process.heartbeat, self._patience
        heartbeat.tick(patience.interval, process.has_worked())
        process.send({"op": "ping"})
        for kind, seconds in heartbeat.report.pace.items():
            self._pace[kind] = max(seconds, self._pace.get(kind, 0.0))
        report = heartbeat.report
        budget = patience.budget(report, self._pace)
        if heartbeat.silent > patience.silence:
            self._replace("worker_silent", f"it did not answer for {patience.silence:g} s")
        elif report.kind and report.seconds > budget:
            self._replace("worker_stuck", f"its {report.kind} took more than {budget:g} s")

    def _replace(self, event: str, reason: str) -> None:
        assert self._process is not None
        self.failure = f"the worker was replaced: {reason}"
        log.error(event, device=self.device, pid=self._process.pid, reason=reason)
        self._process.kill()

    def status(self) -> WorkerStatus:
        process = self._process
        loading = process is not None and process.info is None
        state = self.state
        return WorkerStatus(
            device=self.device,
            state=state,
            stage="asleep" if state == "asleep" else "starting" if process is None else process.stage,
            progress=process.progress if loading and process else 1.0,
            eta=self.seconds_to_ready,
            pid=process.pid if process is not None else None,
            running=len(self.running),
            restarts=self._restarts,
            failure=self._explain(),
        )

    def _explain(self) -> str | None:
        """Why this device does not serve, as far as that is known."""
        if self._state != "suspended":
            return self.failure
        cause = f" The last cause known: {self.failure}" if self.failure else ""
        return f"{self._patience.max_deaths} workers have died in a row; one is tried now and then.{cause}"

    def _on_event(self, process: WorkerProcess, message: Message) -> None:
        header = message.header
        match header["event"]:
            case "loading":
                process.stage, process.progress = header["stage"], header["progress"]
            case "load_failed":
                self.failure = header["message"]
                if self._device_name is None:  # where a worker was ready before, it is restarted
                    self.fail(header["message"])
            case "ready":
                self._on_ready(process, EngineInfo(**known_fields(EngineInfo, header)))
            case _ if (job := self.running.get(header["job"])) is not None:
                self._callbacks.on_job_event(self, job, decode_event(message))

    def _on_ready(self, process: WorkerProcess, info: EngineInfo) -> None:
        if process.condemned:  # it was killed just before
            return
        seconds, again = time.monotonic() - self._started, self._device_name is not None
        cause = "wake" if self._state == "waking" else "restart" if again else "start"
        self._callbacks.cost_model.record_load(seconds)
        self._callbacks.observer.worker_loaded(cause, seconds)
        process.stage, process.progress, process.info = "ready", 1.0, info
        self.failure = None
        self._move_to("ready")
        if self._keep_device(info):
            self._callbacks.on_ready(self, info)
        if again and self.ready:
            log.info("worker_ready", device=self.device, pid=process.pid, seconds=round(seconds, 1))

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

    def _on_condemned(self) -> None:
        """The worker has no future: it was killed, has died, or nobody can talk to it."""
        if self._state == "ready":
            self._move_to("restarting")

    def _on_death(self, process: WorkerProcess) -> None:
        jobs = list(self.running.values())
        self.running.clear()
        self._process = None
        match self._state:
            case "asleep" | "failed" | "stopped":
                pass
            case "waking" if process.info is not None:  # the worker that was put to sleep, which is gone only now
                self._start_after(0.0)
            case _:
                self._restarts += 1
                log.warning("worker_died", device=self.device, pid=process.pid)
                self._restart_later()
        self._callbacks.requeue(jobs, process.suspects)

    def _restart_later(self) -> None:
        delay = self._deaths.count_death()
        if self._deaths.open:
            self._move_to("suspended")
            log.error("worker_suspended", device=self.device, seconds=delay, deaths=self._patience.max_deaths)
        else:
            self._move_to("loading" if self._device_name is None else "restarting")
        self._start_after(delay)

    def _start_after(self, delay: float) -> None:
        if self._state != "stopped":
            self._restarting = asyncio.create_task(self._restart(delay))

    async def _restart(self, delay: float) -> None:
        await asyncio.sleep(delay)
        await self.start()


def local_workers(
    config: EngineConfig,
    devices: Sequence[str] = (),
    patience: Patience = Patience(),  # noqa: B008 - frozen
) -> Supervise:
    """A worker process on each of `devices`; without them, on the one device that `config` names."""
    own = [replace(config, device=device) for device in devices or (config.device,)]
    return lambda callbacks: [WorkerSupervisor(one, callbacks, patience) for one in own]
