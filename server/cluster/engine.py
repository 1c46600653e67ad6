"""The `Engine` deployment: a replica owns one pool of one worker, as a server on one machine does.

It says of a request, word for word, what its worker says: `server.cluster.slots` hears it as from a worker of its own.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Any

from pipelines.engine.base import EngineConfig
from pipelines.errors import FAILURES, PipelineError
from pipelines.job import Job, PreviewPlan
from pipelines.request import ImageRequest
from pipelines.workers.patience import Patience
from pipelines.workers.pool import WorkerPool
from pipelines.workers.protocol import JobDone, JobEvent, JobFailed, encode_event, known_fields
from pipelines.workers.supervision import EngineSupervisor, Supervise
from pipelines.workers.supervisor import local_workers
from server.cluster.settings import ClusterSettings
from server.engine_setup import build_patience

BEATS = 5  # signs of life in the time without one after which an engine counts as lost
EngineMessage = tuple[dict[str, Any], bytes]  # a message's header and payload
ALIVE: EngineMessage = ({"event": "alive"}, b"")


class EngineUnavailable(Exception):
    """This replica cannot carry the request out; another one can."""


async def wait_ready(pool: WorkerPool) -> None:
    """Until it can draw. Raises `EngineUnavailable` if its model cannot be loaded, or each worker dies of it."""
    while (status := pool.status()).state != "ready":
        if status.state in ("failed", "suspended"):
            await pool.stop()
            reason = status.failure or "its worker dies again and again"
            raise EngineUnavailable(f"the model cannot be loaded: {reason}")
        await asyncio.sleep(0.1)


class EnginePool(WorkerPool):
    """A pool that also hands on what its worker says of a job."""

    def __init__(self, supervise: Supervise, **options: Any) -> None:
        super().__init__(supervise, **options)
        self._heard: dict[str, asyncio.Queue[JobEvent]] = {}

    def hear(self, job: Job) -> asyncio.Queue[JobEvent]:
        """What the worker says of a job from now on, until `leave`."""
        return self._heard.setdefault(job.id, asyncio.Queue())

    def leave(self, job: Job) -> None:
        self._heard.pop(job.id, None)
        self.cancel(job)

    def on_job_event(self, supervisor: EngineSupervisor, job: Job, event: JobEvent) -> None:
        if (queue := self._heard.get(job.id)) is not None:
            waited = replace(event, timings=job.add_wait(event.timings)) if isinstance(event, JobDone) else event
            queue.put_nowait(waited)
        super().on_job_event(supervisor, job, event)


class EngineService:
    """What an engine replica does, apart from Ray."""

    def __init__(self, pool: EnginePool, patience: Patience, beat: float) -> None:
        self._pool = pool
        self._patience = patience
        self._beat = beat

    async def load(self) -> None:
        """Returns when the engine is ready. Raises `EngineUnavailable` if it cannot be loaded."""
        await self._pool.start()
        await wait_ready(self._pool)

    def describe(self) -> dict[str, Any]:
        """The fields of `EngineInfo`."""
        info = self._pool.status().info
        assert info is not None
        return asdict(info)

    async def draw(
        self, request: dict[str, Any], pixels: bytes, previews: dict[str, int], fingerprint: str, tenant: str = ""
    ) -> AsyncIterator[EngineMessage]:
        """What the worker says of the request, to `done` or `failed`; `alive` at the beginning and in each pause.

        Raises `EngineUnavailable` where it should be asked of another replica: too, if this one would draw other bytes
        than those of `fingerprint`. Tenants take turns, as at one server. Closing the iterator ends the work within a
        step.
        """
        if self.describe()["fingerprint"] != fingerprint:
            raise EngineUnavailable("this engine draws other bytes than the one that was described")
        try:
            drawn = ImageRequest.from_json(request, pixels)
        except TypeError:  # while a cluster is updated: to draw without the field would be another picture
            raise EngineUnavailable("the request has a field that this engine's version does not know") from None
        plan = PreviewPlan(**known_fields(PreviewPlan, previews))
        try:
            job = self._pool.submit(drawn, plan, tenant=tenant)
        except PipelineError as error:
            raise EngineUnavailable(type(error).__name__) from None
        queue = self._pool.hear(job)
        try:
            yield ALIVE
            while not job.finished or not queue.empty():
                try:
                    async with asyncio.timeout(self._beat):
                        event = await queue.get()
                except TimeoutError:
                    yield ALIVE
                    continue
                yield encode_event(event)
                if isinstance(event, JobDone | JobFailed):
                    return
            yield encode_event(JobFailed(job.id, await self._failure(job)))
        finally:
            self._pool.leave(job)

    async def _failure(self, job: Job) -> str:
        """How a job ended of which the worker said nothing: it died twice."""
        try:
            await job.result()
        except PipelineError as error:
            if type(error).__name__ in FAILURES:
                return type(error).__name__
            raise EngineUnavailable(type(error).__name__) from None
        raise EngineUnavailable("the end was not heard")

    def check(self) -> None:
        """Raises `EngineUnavailable` where this process can no longer help: Serve then replaces it.

        One worker's death or silence is the pool's own business: it starts another one.
        """
        status = self._pool.status()
        silence = max(supervisor.silence for supervisor in self._pool.supervisors)
        if status.state in ("failed", "suspended") or silence > 2 * self._patience.silence:
            raise EngineUnavailable(f"{status.state}, silent for {silence:.0f} s")


def build_engine(settings: ClusterSettings, config: EngineConfig) -> EngineService:
    patience = build_patience(settings)
    pool = EnginePool(
        local_workers(config, settings.devices, patience),
        queue_size=settings.max_running,
        max_running=settings.max_running,
        request_timeout=settings.request_timeout,
    )
    return EngineService(pool, patience, settings.engine_timeout / BEATS)
