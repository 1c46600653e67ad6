"""Requests that outlive their client and their server: accepted once, finished once.

The ledger knows what was accepted; here it is carried out. At start, everything unfinished is taken up again, in the
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
from server.errors import Gone, KeyReused, NotFound, ServerError, StorageFull, envelope, headers_of, row_of
from server.jobs.asked import Asked
from server.jobs.generation import Run, reply_headers
from server.jobs.store import ACCEPTED, CANCELLED, EXPIRED, FAILED, SUCCEEDED, Entry, Ledger
from server.schema import GenerationReply
from server.state import AppState

RETRY = 0.05  # seconds between two tries to put a job of the last run back into the line
LOOK = 1.0  # seconds between looks for cancellations from the command line, while there is something to cancel
SWEEP_EVERY = 60.0  # seconds
log = structlog.get_logger("srpo")


class LiveJob:
    """An unfinished job in this process. `run` waits until the pool has admitted it, `ended` until it is over."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.cancelled = False
        loop = asyncio.get_running_loop()
        self.run: asyncio.Future[Run | None] = loop.create_future()
        self.ended: asyncio.Future[Entry] = loop.create_future()

    @property
    def admitted(self) -> Run | None:
        return self.run.result() if self.run.done() else None

    def cancel(self) -> None:
        self.cancelled = True
        if run := self.admitted:
            run.cancel()


class Jobs:
    """All durable jobs of one server."""

    def __init__(self, server: AppState, ledger: Ledger) -> None:
        self.epoch = secrets.token_hex(4)  # event numbers begin anew with every process
        self._server = server
        self._ledger = ledger
        self._live: dict[str, LiveJob] = {}
        self._keys = asyncio.Lock()  # one keyed request at a time is looked up and accepted
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the ledger and take up what was left unfinished."""
        await asyncio.to_thread(self._ledger.open)
        entries = await asyncio.to_thread(self._ledger.unfinished)
        for entry in entries:
            self._live[entry.id] = LiveJob(entry)
        resuming = self._resume([self._live[entry.id] for entry in entries])
        self._duties = [asyncio.ensure_future(duty) for duty in (resuming, self._look_around())]

    async def stop(self) -> None:
        """Call it when the pool has stopped. What is unfinished stays in the ledger."""
        for duty in self._duties:
            duty.cancel()
        await asyncio.gather(*self._duties, *self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._ledger.close)

    async def accept(self, asked: Asked, owner: str, key: str | None, body_hash: str) -> tuple[Entry, bool]:
        """Admit a request and write it down, or find the one that has its key. True: it had been accepted before.

        Raises `KeyReused`, `StorageFull`, and what `Run` raises before any work.
        """
        if key is None:
            request = await asked.request(self._server)
            admission = asyncio.ensure_future(self._admit(asked, request, owner, None, body_hash))
            return await asyncio.shield(admission), False  # a row without its run would wait for the next start
        keyed = asyncio.ensure_future(self._accept(asked, owner, key, body_hash))
        return await asyncio.shield(keyed)

    async def _accept(self, asked: Asked, owner: str, key: str, body_hash: str) -> tuple[Entry, bool]:
        async with self._keys:  # a source picture is not fetched for a second answer
            if known := await self._known(owner, key, body_hash):
                return known, True
        request = await asked.request(self._server)
        async with self._keys:
            if known := await self._known(owner, key, body_hash):
                return known, True
            return await self._admit(asked, request, owner, key, body_hash), False

    async def _known(self, owner: str, key: str, body_hash: str) -> Entry | None:
        entry = await asyncio.to_thread(self._ledger.find_key, owner, key)
        if entry is not None and entry.body_hash != body_hash:
            raise KeyReused
        return entry

    async def _admit(self, asked: Asked, request: ImageRequest, owner: str, key: str | None, body_hash: str) -> Entry:
        run = Run(self._server, asked, request)
        asked = replace(asked, fingerprint=self._fingerprint())
        identity = f"job_{secrets.token_hex(16)}"
        entry = Entry(identity, owner, key, body_hash, asked.to_json(request), created=time.time())
        try:
            await asyncio.to_thread(self._ledger.add, entry, request.source.pixels if request.source else None)
        except Exception:
            run.cancel()
            raise
        live = self._live[identity] = LiveJob(entry)
        live.run.set_result(run)
        self._spawn(self._carry(live, run))
        return entry

    async def find(self, identity: str, owner: str) -> tuple[Entry, LiveJob | None]:
        """A job of this owner's. Raises `NotFound` or `Gone`."""
        live = self._live.get(identity)
        entry = live.entry if live else await asyncio.to_thread(self._ledger.find, identity)
        if entry is None or entry.owner != owner:
            raise NotFound("There is no such job.")
        if entry.state == EXPIRED:
            raise Gone("This job has expired.")
        return entry, live

    async def page(self, owner: str, limit: int, after: str | None, states: tuple[str, ...]) -> list[Entry]:
        before = (await self.find(after, owner))[0] if after else None
        if before and not before.number:  # accepted by this process
            before = await asyncio.to_thread(self._ledger.find, before.id)
        return await asyncio.to_thread(self._ledger.page, owner, limit, before.number if before else None, states)

    def live(self, identity: str) -> LiveJob | None:
        return self._live.get(identity)

    async def ended(self, entry: Entry) -> Entry:
        """The job when it is over. Raises `Draining` if the server goes down before."""
        if live := self._live.get(entry.id):
            return await asyncio.shield(live.ended)
        found = await asyncio.to_thread(self._ledger.find, entry.id)
        if found is None or found.state == ACCEPTED:
            raise Draining
        return found

    async def cancel(self, identity: str, owner: str) -> Entry:
        """Cancel a job; one that has ended stays as it is."""
        entry, live = await self.find(identity, owner)
        if live is None:
            return entry
        live.cancel()
        return await self.ended(entry)

    # --- carrying out -------------------------------------------------------------------------------------------

    async def _resume(self, jobs: list[LiveJob]) -> None:
        for live in jobs:
            try:
                assert live.entry.request is not None
                asked = Asked.from_json(live.entry.request, self._server.served)
                live.run.set_result(await self._admit_again(live, asked))
                run = live.admitted
            except Draining:
                return
            except (PipelineError, ServerError) as error:
                live.run.set_result(None)
                await self._end(live, error)
                continue
            if run is None:
                await self._end(live, Cancelled())
            else:
                self._spawn(self._carry(live, run))

    async def _admit_again(self, live: LiveJob, asked: Asked) -> Run | None:
        request = asked.again(self._server, await asyncio.to_thread(self._ledger.source, live.entry.id))
        while not live.cancelled:
            try:
                return Run(self._server, asked, request)
            except (NotReady, QueueFull):
                await asyncio.sleep(RETRY)
        return None

    async def _carry(self, live: LiveJob, run: Run) -> None:
        try:
            reply = self._compared(await run.reply(), live.entry)
            text = await asyncio.to_thread(reply.text)
            headers = reply_headers(reply, run.translated, self._server)
            status = self._server.settings.success_status
            await asyncio.to_thread(self._ledger.end, live.entry.id, SUCCEEDED, status, headers, text)
            await self._close(live)
        except Draining:
            self._forget(live)
        except Exception as error:  # the edge of a request that nobody may be waiting for
            if row_of(error).status == 500:
                log.error("job", job=live.entry.id, error=type(error).__name__, exc_info=error)
            await self._end(live, error)

    def _fingerprint(self) -> str | None:
        info = self._server.pool.status().info
        return info.fingerprint if info else None

    def _compared(self, reply: GenerationReply, entry: Entry) -> GenerationReply:
        """The reply; it says so where another engine drew it than the one that was there when it was asked for."""
        before, now = (entry.request or {}).get("fingerprint"), self._fingerprint()
        if before is None or before == now:
            return reply
        note = f"accepted by the engine {before} and drawn, after a restart, by {now}: the bytes may differ"
        notes = [*cast(list[str], reply.timings.get("notes", [])), note]
        return reply.model_copy(update={"timings": reply.timings | {"notes": notes}})

    async def _end(self, live: LiveJob, error: Exception) -> None:
        """A job that did not become images. Its key is free again if another try may go better."""
        state = CANCELLED if isinstance(error, Cancelled) else FAILED
        row = row_of(error)
        told = envelope(error, live.entry.id, f"/v1/jobs/{live.entry.id}")
        free = state == CANCELLED or (row.status >= 429 and not row.repeats)
        text = json.dumps(told)
        try:
            await asyncio.to_thread(
                self._ledger.end, live.entry.id, state, row.status, headers_of(error), text, free_key=free
            )
            await self._close(live)
        except ServerError as full:  # the ledger cannot be written: the next start tries again
            log.error("job", job=live.entry.id, error=type(full).__name__)
            self._forget(live)

    async def _close(self, live: LiveJob) -> None:
        ended = await asyncio.to_thread(self._ledger.find, live.entry.id)
        assert ended is not None
        live.ended.set_result(ended)
        del self._live[live.entry.id]

    def _forget(self, live: LiveJob) -> None:
        """The server goes down with this job unfinished."""
        live.ended.set_exception(Draining())
        live.ended.exception()  # looked at, whether or not anybody waits
        del self._live[live.entry.id]

    async def _look_around(self) -> None:
        """Notice what `srpo jobs` has cancelled, and forget what has expired."""
        swept = float("-inf")
        while True:
            try:
                if self._live:
                    gone = await asyncio.to_thread(self._ledger.cancelled_among, list(self._live))
                    for identity in gone & set(self._live):
                        self._live[identity].cancel()
                if time.monotonic() > swept + SWEEP_EVERY:
                    await asyncio.to_thread(self._ledger.sweep, self._server.settings.images_expire)
                    swept = time.monotonic()
            except StorageFull as error:
                log.error("jobs", error=type(error).__name__)
            await asyncio.sleep(LOOK)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
