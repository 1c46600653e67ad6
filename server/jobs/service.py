"""Requests that outlive their client and their server: accepted once, finished once.

The job store knows what was accepted; here it is carried out. At start, everything unfinished is taken up again, in the
order in which it came: jobs are pure, so the bytes are the same.
"""

import asyncio
import json
import secrets
import time
from dataclasses import replace
from typing import Any, cast

import structlog

from pipelines.errors import Cancelled, Draining, NotReady, PipelineError, QueueFull
from pipelines.request import ImageRequest
from server.errors import Gone, KeyReused, NotFound, ServerError, StorageBusy, StorageFull, envelope, headers_of, row_of
from server.jobs.generation import Generation, reply_headers
from server.jobs.models import ACCEPTED, CANCELLED, EXPIRED, FAILED, SUCCEEDED, JobRecord
from server.jobs.spec import JobSpec
from server.jobs.store import JobStore
from server.schema import GenerationReply
from server.state import AppState

RETRY = 0.05  # seconds between two tries to put a job of the last run back into the line
LOOK = 1.0  # seconds between looks for cancellations from the command line, while there is something to cancel
SWEEP_EVERY = 60.0  # seconds
log = structlog.get_logger("srpo")


class ActiveJob:
    """An unfinished job here. `generation` waits until the pool has admitted it, `ended` until the job is over."""

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self.cancelled = False
        loop = asyncio.get_running_loop()
        self.generation: asyncio.Future[Generation | None] = loop.create_future()
        self.ended: asyncio.Future[JobRecord] = loop.create_future()

    @property
    def admitted(self) -> Generation | None:
        return self.generation.result() if self.generation.done() else None

    def cancel(self) -> None:
        self.cancelled = True
        if generation := self.admitted:
            generation.cancel()


class Jobs:
    """All durable jobs of one server."""

    def __init__(self, server: AppState, store: JobStore) -> None:
        self.epoch = secrets.token_hex(4)  # event numbers begin anew with every process
        self._server = server
        self._store = store
        self._live: dict[str, ActiveJob] = {}
        self._keys = asyncio.Lock()  # one keyed request at a time is looked up and accepted
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the store and take up what was left unfinished."""
        await asyncio.to_thread(self._store.open)
        records = await asyncio.to_thread(self._store.unfinished)
        for record in records:
            self._live[record.id] = ActiveJob(record)
        resuming = self._resume([self._live[record.id] for record in records])
        self._duties = [asyncio.ensure_future(duty) for duty in (resuming, self._look_around())]

    async def stop(self) -> None:
        """Call it when the pool has stopped. What is unfinished stays in the store."""
        for duty in self._duties:
            duty.cancel()
        await asyncio.gather(*self._duties, *self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._store.close)

    async def accept(self, spec: JobSpec, owner: str, key: str | None, body_hash: str) -> tuple[JobRecord, bool]:
        """Admit a request and write it down, or find the one that has its key. True: it had been accepted before.

        Raises `KeyReused`, `StorageFull`, `StorageBusy`, and what `Generation` raises before any work.
        """
        if key is None:
            request = await spec.request(self._server)
            admission = asyncio.ensure_future(self._admit(spec, request, owner, None, body_hash))
            return await asyncio.shield(admission), False  # a row without its run would wait for the next start
        keyed = asyncio.ensure_future(self._accept(spec, owner, key, body_hash))
        return await asyncio.shield(keyed)

    async def _accept(self, spec: JobSpec, owner: str, key: str, body_hash: str) -> tuple[JobRecord, bool]:
        async with self._keys:  # a source picture is not fetched for a second answer
            if known := await self._known(owner, key, body_hash):
                return known, True
        request = await spec.request(self._server)
        async with self._keys:
            if known := await self._known(owner, key, body_hash):
                return known, True
            return await self._admit(spec, request, owner, key, body_hash), False

    async def _known(self, owner: str, key: str, body_hash: str) -> JobRecord | None:
        record = await asyncio.to_thread(self._store.find_key, owner, key)
        if record is not None and record.body_hash != body_hash:
            raise KeyReused
        return record

    async def _admit(
        self, spec: JobSpec, request: ImageRequest, owner: str, key: str | None, body_hash: str
    ) -> JobRecord:
        generation = Generation(self._server, spec, request)
        spec = replace(spec, fingerprint=self._fingerprint())
        identity = f"job_{secrets.token_hex(16)}"
        record = JobRecord(identity, owner, key, body_hash, spec.to_json(request), created=time.time())
        try:
            await asyncio.to_thread(self._store.add, record, request.source.pixels if request.source else None)
        except Exception:
            generation.cancel()
            raise
        live = self._live[identity] = ActiveJob(record)
        live.generation.set_result(generation)
        self._spawn(self._carry(live, generation))
        return record

    async def find(self, identity: str, owner: str) -> tuple[JobRecord, ActiveJob | None]:
        """A job of this owner's. Raises `NotFound` or `Gone`."""
        live = self._live.get(identity)
        record = live.record if live else await asyncio.to_thread(self._store.find, identity)
        if record is None or record.owner != owner:
            raise NotFound("There is no such job.")
        if record.state == EXPIRED:
            raise Gone("This job has expired.")
        return record, live

    async def page(self, owner: str, limit: int, after: str | None, states: tuple[str, ...]) -> list[JobRecord]:
        before = (await self.find(after, owner))[0] if after else None
        if before and not before.number:  # accepted by this process
            before = await asyncio.to_thread(self._store.find, before.id)
        return await asyncio.to_thread(self._store.page, owner, limit, before.number if before else None, states)

    def live(self, identity: str) -> ActiveJob | None:
        return self._live.get(identity)

    async def ended(self, record: JobRecord) -> JobRecord:
        """The job when it is over. Raises `Draining` if the server goes down before."""
        if live := self._live.get(record.id):
            return await asyncio.shield(live.ended)
        found = await asyncio.to_thread(self._store.find, record.id)
        if found is None or found.state == ACCEPTED:
            raise Draining
        return found

    async def cancel(self, identity: str, owner: str) -> JobRecord:
        """Cancel a job; one that has ended stays as it is."""
        record, live = await self.find(identity, owner)
        if live is None:
            return record
        live.cancel()
        return await self.ended(record)

    # --- carrying out -------------------------------------------------------------------------------------------

    async def _resume(self, jobs: list[ActiveJob]) -> None:
        for live in jobs:
            try:
                assert live.record.request is not None
                spec = JobSpec.from_json(live.record.request, self._server.served)
                live.generation.set_result(await self._admit_again(live, spec))
                generation = live.admitted
            except Draining:
                return
            except (PipelineError, ServerError) as error:
                live.generation.set_result(None)
                await self._end(live, error)
                continue
            if generation is None:
                await self._end(live, Cancelled())
            else:
                self._spawn(self._carry(live, generation))

    async def _admit_again(self, live: ActiveJob, spec: JobSpec) -> Generation | None:
        request = spec.again(self._server, await asyncio.to_thread(self._store.source, live.record.id))
        while not live.cancelled:
            try:
                return Generation(self._server, spec, request)
            except (NotReady, QueueFull):
                await asyncio.sleep(RETRY)
        return None

    async def _carry(self, live: ActiveJob, generation: Generation) -> None:
        try:
            reply = self._compared(await generation.reply(), live.record)
            text = await asyncio.to_thread(reply.text)
            headers = reply_headers(reply, generation.translated, self._server)
            status = self._server.settings.success_status
            await asyncio.to_thread(self._store.end, live.record.id, SUCCEEDED, status, headers, text)
            await self._close(live)
        except Draining:
            self._forget(live)
        except Exception as error:  # the edge of a request that nobody may be waiting for
            if row_of(error).status == 500:
                log.error("job", job=live.record.id, error=type(error).__name__, exc_info=error)
            await self._end(live, error)

    def _fingerprint(self) -> str | None:
        info = self._server.pool.status().info
        return info.fingerprint if info else None

    def _compared(self, reply: GenerationReply, record: JobRecord) -> GenerationReply:
        """The reply; it says so where another engine drew it than the one that was there when it was asked for."""
        before, now = (record.request or {}).get("fingerprint"), self._fingerprint()
        if before is None or before == now:
            return reply
        note = f"accepted by the engine {before} and drawn, after a restart, by {now}: the bytes may differ"
        notes = [*cast(list[str], reply.timings.get("notes", [])), note]
        return reply.model_copy(update={"timings": reply.timings | {"notes": notes}})

    async def _end(self, live: ActiveJob, error: Exception) -> None:
        """A job that did not become images. Its key is free again if another try may go better."""
        state = CANCELLED if isinstance(error, Cancelled) else FAILED
        row = row_of(error)
        told = envelope(error, live.record.id, f"/v1/jobs/{live.record.id}")
        free = state == CANCELLED or (row.status >= 429 and not row.repeats)
        text = json.dumps(told)
        try:
            await asyncio.to_thread(
                self._store.end, live.record.id, state, row.status, headers_of(error), text, free_key=free
            )
            await self._close(live)
        except ServerError as full:  # the store cannot be written: the next start tries again
            log.error("job", job=live.record.id, error=type(full).__name__)
            self._forget(live)

    async def _close(self, live: ActiveJob) -> None:
        ended = await asyncio.to_thread(self._store.find, live.record.id)
        assert ended is not None
        live.ended.set_result(ended)
        del self._live[live.record.id]

    def _forget(self, live: ActiveJob) -> None:
        """The server goes down with this job unfinished."""
        live.ended.set_exception(Draining())
        live.ended.exception()  # looked at, whether or not anybody waits
        del self._live[live.record.id]

    async def _look_around(self) -> None:
        """Notice what `srpo jobs` has cancelled, and forget what has expired."""
        swept = float("-inf")
        while True:
            try:
                if self._live:
                    gone = await asyncio.to_thread(self._store.cancelled_among, list(self._live))
                    for identity in gone & set(self._live):
                        self._live[identity].cancel()
                if time.monotonic() > swept + SWEEP_EVERY:
                    await asyncio.to_thread(self._store.sweep, self._server.settings.images_expire)
                    swept = time.monotonic()
            except (StorageBusy, StorageFull) as error:
                log.error("jobs", error=type(error).__name__)
            await asyncio.sleep(LOOK)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
