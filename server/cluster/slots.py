"""Engines of the cluster, as the pool of an `Api` replica sees them: each is a supervisor with places for jobs.

A slot stands for an engine, but Serve chooses which replica carries a call out: the one with the least to do. Where
that replica dies, is silent or sends the call back, the job goes back to the pool and is called again: as often as it
takes while no engine has begun with it, and at most twice after one has, since then the job may be the cause. Serve may
choose a replica that is frozen until its health check has failed, so that one call after another is lost there. Jobs
are pure: another call draws the same bytes.

After a change of weights or code the new engines draw other bytes, and refuse what is asked in the name of the old
ones. So after a call that was lost before it began an engine is asked again what it is.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import structlog

from pipelines.duties import keep_running
from pipelines.engine.base import EngineInfo
from pipelines.errors import CannotSleep
from pipelines.job import Job
from pipelines.workers.activity import IDLE, ActivityReport
from pipelines.workers.protocol import EVENT_NAMES, Message, ProtocolError, decode_event
from pipelines.workers.status import WorkerState, WorkerStatus
from pipelines.workers.supervision import EngineSupervisor, SupervisorCallbacks

LOOK = 0.5  # seconds between questions to the controller
BEGINNING = 2.0  # of the time after which an engine counts as lost: what one may take until its first sign of life
log = structlog.get_logger("srpo")


class CallLost(Exception):
    """A call that should be made again. `reason` holds nothing of the request."""


class Call(Protocol):
    """A request at an engine."""

    def messages(self) -> AsyncIterator[tuple[dict[str, Any], bytes]]:
        """What the engine says. Raises `CallLost`."""
        ...

    def cancel(self) -> None: ...


class Engines(Protocol):
    """All engines of a cluster."""

    async def count_ready(self) -> int:
        """How many there are now. Raises `CallLost` where that cannot be learnt."""
        ...

    async def describe(self) -> EngineInfo:
        """Any of them. Raises `CallLost`."""
        ...

    def draw(
        self, request: dict[str, Any], pixels: bytes, previews: dict[str, int], fingerprint: str, tenant: str
    ) -> Call: ...


class EngineRoster:
    """How many engines there are and what they are: asked for all slots together."""

    def __init__(self, engines: Engines, callbacks: SupervisorCallbacks, timeout: float) -> None:
        self.engines = engines
        self.callbacks = callbacks
        self.timeout = timeout
        self.info: EngineInfo | None = None
        self.doubted = False  # whether `info` may be that of engines which are gone
        self.ready = 0
        self.most_ready = 0  # so far
        self.lost: WeakKeyDictionary[Job, int] = WeakKeyDictionary()  # calls of a job
        self.started = time.monotonic()
        self.slots: Sequence[EngineSlot] = ()

    async def watch(self) -> None:
        while True:
            try:
                count = await self.engines.count_ready()
                if self.info is not None:
                    self._update(count, self.info)  # first: a busy engine may not say what it is
                if count and (self.info is None or self.doubted):
                    self._update(count, self._learn(await self.engines.describe()))
            except CallLost as error:
                log.warning("engines_not_counted", reason=str(error))
            await asyncio.sleep(LOOK)

    def _learn(self, info: EngineInfo) -> EngineInfo:
        """What an engine says of itself. Where others have taken the place of those that were known, all begin anew."""
        self.doubted = False
        if self.info is None:
            self.callbacks.cost_model.record_load(time.monotonic() - self.started)
        elif self.info.fingerprint != info.fingerprint:
            log.info("engines_replaced", before=self.info.fingerprint, now=info.fingerprint)
            self.ready = 0
        self.info = info
        return info

    def _update(self, count: int, info: EngineInfo) -> None:
        """One slot after the other is ready: the pool compares each with those that are ready already."""
        before, self.ready = self.ready, min(self.ready, count)
        self.most_ready = max(self.most_ready, count)
        for slot in self.slots[before:count]:
            self.ready += 1
            self.callbacks.on_ready(slot, info)
        self.ready = count


class EngineSlot:
    """The places of one engine. An `EngineSupervisor`."""

    suspended = False
    silence = 0.0
    report: ActivityReport = IDLE
    watch_interval = 1.0

    def __init__(self, number: int, roster: EngineRoster) -> None:
        self.running: dict[str, Job] = {}
        self.failed = False
        self.failure: str | None = None
        self._number = number
        self._roster = roster
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._begun: set[str] = set()  # jobs with which an engine has begun
        self._watching: asyncio.Task[None] | None = None
        self._lost = 0

    @property
    def device(self) -> str:
        return f"engine {self._number}"

    @property
    def ready(self) -> bool:
        return self._roster.info is not None and self._roster.ready > self._number and not self.failed

    async def start(self) -> None:
        if self._number == 0:
            self._watching = asyncio.create_task(keep_running("engines", self._roster.watch))

    async def stop(self) -> None:
        tasks = [*self._calls.values(), *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def fail(self, reason: str) -> None:
        self.failed, self.failure = True, reason
        self._roster.callbacks.on_failed(self)

    def run(self, job: Job) -> None:
        job.dispatched = time.monotonic()
        self.running[job.id] = job
        self._begun.discard(job.id)
        self._calls[job.id] = task = asyncio.create_task(self._draw(job))
        task.add_done_callback(lambda ended: self._forget(job, ended))

    def _forget(self, job: Job, ended: asyncio.Task[None]) -> None:
        """Unless the job has been called again already."""
        if self._calls.get(job.id) is ended:
            del self._calls[job.id]
            self._begun.discard(job.id)

    def count(self, tenant: str) -> int:
        return sum(job.tenant == tenant for job in self.running.values())

    def cancel(self, job: Job) -> None:
        if self.running.pop(job.id, None) is not None and (call := self._calls.get(job.id)):
            call.cancel()

    def release(self, job: Job) -> None:
        del self.running[job.id]

    def watch(self) -> None:
        """Nothing to do: each call has its own clock."""

    def sleep(self) -> None:
        raise CannotSleep

    def wake(self) -> None:
        """Nothing to do: it never sleeps."""

    @property
    def state(self) -> WorkerState:
        if self.failed:
            return "failed"
        return "ready" if self.ready else "restarting" if self._roster.most_ready > self._number else "loading"

    @property
    def seconds_to_ready(self) -> float:
        waited = time.monotonic() - self._roster.started
        return 0.0 if self.ready else self._roster.callbacks.cost_model.estimate_load_seconds(waited, 0.0)

    def status(self) -> WorkerStatus:
        ready = self.ready
        return WorkerStatus(
            device=self.device,
            state=self.state,
            stage="ready" if ready else "waiting for an engine",
            progress=1.0 if ready else 0.0,
            eta=self.seconds_to_ready,
            pid=None,
            running=len(self.running),
            restarts=self._lost,
            failure=self.failure,
        )

    async def _draw(self, job: Job) -> None:
        roster, source = self._roster, job.request.source
        assert roster.info is not None
        pixels, previews = source.pixels if source else b"", asdict(job.previews)
        call: Call | None = None
        try:
            call = roster.engines.draw(job.request.to_json(), pixels, previews, roster.info.fingerprint, job.tenant)
            await self._follow(job, call)
        except Exception as error:
            if call is not None:
                call.cancel()
            reason, known = str(error), isinstance(error, CallLost)
            if not known:  # the request itself may be what fails
                reason = type(error).__name__
                log.error("engine_call_failed", job=job.id, error=reason, exc_info=error)
            begun = job.id in self._begun
            if not begun:
                roster.doubted = True
                await asyncio.sleep(LOOK)  # in which Serve may learn that the replica is gone
            if self.running.pop(job.id, None) is not None:
                self._call_again(job, reason, begun or not known)
        except BaseException:
            if call is not None:
                call.cancel()
            raise

    async def _follow(self, job: Job, call: Call) -> None:
        """Raises `CallLost`, also if the engine is silent. One that has not begun may be busy with its beginning."""
        messages = aiter(call.messages())
        limit = BEGINNING * self._roster.timeout
        while job.id in self.running:
            try:
                async with asyncio.timeout(limit):
                    header, payload = await anext(messages)
            except TimeoutError:
                raise CallLost(f"silent for {limit:g} s") from None
            except StopAsyncIteration:
                raise CallLost("it ended too soon") from None
            limit = self._roster.timeout
            self._begun.add(job.id)
            if header["event"] in EVENT_NAMES.values():  # else a sign of life, or an engine's of a later version
                try:
                    event = decode_event(Message(header, payload))
                except ProtocolError as error:
                    raise CallLost(str(error)) from None
                self._roster.callbacks.on_job_event(self, job, event)

    def _call_again(self, job: Job, reason: str, begun: bool) -> None:
        """Back to the pool. From the second loss on after an engine had begun with it, the job itself is suspected, and
        is given up at the third.
        """
        self._lost += 1
        lost = self._roster.lost[job] = self._roster.lost.get(job, 0) + begun
        log.warning("engine_call_lost", job=job.id, times=lost, begun=begun, reason=reason)
        self._roster.callbacks.requeue([job], frozenset({job.id} if lost > 1 else ()))


def make_slots(
    engines: Engines, callbacks: SupervisorCallbacks, count: int, timeout: float
) -> Sequence[EngineSupervisor]:
    """Slots for `count` engines. One that is silent for `timeout` seconds has lost its call; before its first sign of
    life, for twice as long.
    """
    roster = EngineRoster(engines, callbacks, timeout)
    roster.slots = [EngineSlot(number, roster) for number in range(count)]
    return roster.slots
