"""Carries out the jobs of this process, and writes down how each one ended."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, cast

import structlog

from pipelines.errors import Cancelled, Draining
from server.envelope import envelope, headers_of
from server.error_table import row_of
from server.errors import Gone, ServerError
from server.jobs.generation import Generation, reply_headers
from server.jobs.models import ACCEPTED, CANCELLED, FAILED, SUCCEEDED, JobRecord
from server.jobs.store import JobStore
from server.process.backoff import pauses
from server.schema import GenerationReply
from server.state import AppState

FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0  # seconds between tries to write an outcome down
UNKNOWN_TRIES = 8  # about a minute of an error that nobody expected: it may be the outcome that cannot be written
log = structlog.get_logger("srpo")


class TakenOver(Exception):
    """Another server carries the job out by now."""


class ActiveJob:
    """An unfinished job of this process.

    `generation` resolves when the pool has admitted the job, to None if it never does. `ended` resolves to the record
    as it is when the job is over, or fails: with `Draining` if the server goes down before, with `TakenOver` if another
    one has taken the job over, with `Gone` if it has been deleted from the database.
    """

    def __init__(self, record: JobRecord) -> None:
        self.record = record
        self.cancelled = False
        loop = asyncio.get_running_loop()
        self.generation: asyncio.Future[Generation | None] = loop.create_future()
        self.ended: asyncio.Future[JobRecord] = loop.create_future()

    @property
    def admitted(self) -> Generation | None:
        """The generation, if the pool has admitted it by now."""
        return self.generation.result() if self.generation.done() else None

    def cancel(self) -> None:
        self.cancelled = True
        if generation := self.admitted:
            generation.cancel()


class JobRunner:
    """The active jobs, by id. A job leaves when its end is written down."""

    def __init__(self, state: AppState, store: JobStore) -> None:
        self.active: dict[str, ActiveJob] = {}
        self.unwritten: dict[str, Exception] = {}  # jobs that are over, and why that is not written down yet
        self._stopping = asyncio.Event()
        self._state = state
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self, record: JobRecord) -> ActiveJob:
        """A job that can be found and cancelled from now on, and is not admitted yet."""
        job = self.active[record.id] = ActiveJob(record)
        return job

    def run(self, job: ActiveJob, generation: Generation) -> None:
        """Carry out an admitted job in the background."""
        job.generation.set_result(generation)
        self._begin(self._run(job, generation))

    def cancel(self, job: ActiveJob) -> None:
        """Cancel a job. One that waits to be admitted does not wait any more."""
        job.cancel()
        self.refuse(job, Cancelled())

    def refuse(self, job: ActiveJob, error: Exception) -> None:
        """End a job, in the background, unless it has been admitted."""
        if not job.generation.done():
            job.generation.set_result(None)
            self._begin(self._fail(job, error))

    def give_back(self, job: ActiveJob) -> None:
        """Leave a job that has not been admitted to the server after this one."""
        if not job.generation.done():
            job.generation.set_result(None)
            self._abandon(job, Draining())

    async def finish_running(self, seconds: float) -> None:
        """Wait for those that a device draws now, at most so long. Those that wait are the next server's."""
        drawing = [job.ended for job in self.active.values() if job.admitted and job.admitted.job.dispatched]
        if drawing:
            await asyncio.wait(drawing, timeout=max(0.0, seconds))

    async def stop(self) -> None:
        """Wait until every job has ended. Call it when the pool has stopped: what is unfinished stays so."""
        self._stopping.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: ActiveJob, generation: Generation) -> None:
        try:
            reply = self._note_other_engine(await generation.reply(), job.record)
            text = await self._state.threads.run("encoding", reply.text)
            headers = reply_headers(reply, generation.translated, self._state)
            status = self._state.settings.success_status
            ending = partial(self._store.end, job.record.id, SUCCEEDED, status, headers, text)
            ending = partial(ending, pictures=generation.delivery.pictures or None, usage=generation.usage)
            await self._record_outcome(job, ending, UNKNOWN_TRIES)
        except Draining as error:
            self._abandon(job, error)
        except Exception as error:  # the edge of a request that nobody may be waiting for
            if row_of(error).status == 500:
                log.error("job", job=job.record.id, error=type(error).__name__, exc_info=error)
            await self._fail(job, error)

    async def _fail(self, job: ActiveJob, error: Exception) -> None:
        """End a job without images. Its idempotency key becomes free if another try may go better."""
        identity = job.record.id
        state = CANCELLED if isinstance(error, Cancelled) else FAILED
        row = row_of(error)
        text = json.dumps(envelope(error, identity, f"/v1/jobs/{identity}"))
        free_key = state == CANCELLED or (row.status >= 429 and not row.repeats)
        ending = partial(self._store.end, identity, state, row.status, headers_of(error), text, free_key=free_key)
        await self._record_outcome(job, ending)

    async def _record_outcome(self, job: ActiveJob, ending: Callable[..., bool], unknown_tries: float = inf) -> None:
        """Write how a job ended. Where that fails it is kept, and tried again until it is written or the server ends.

        The job stays active meanwhile. If the server ends it is drawn again by the next one. Raises an error that is
        not one of ours, as of a mistake in this program, when it has come `unknown_tries` times.
        """
        waits = pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                await self._state.threads.run("database", ending, attempt=job.record.attempt)
                record = await self._state.threads.run("database", self._store.find, job.record.id)
                break
            except Exception as error:
                known, pause = isinstance(error, ServerError), next(waits)
                told = {"job": job.record.id, "error": type(error).__name__, "again_in": pause}
                log.error("outcome_not_written", **told, exc_info=None if known else error)
                self.unwritten[job.record.id] = error
                unknown_tries -= not known
                if not unknown_tries:
                    raise
            if self._stopping.is_set():
                self._abandon(job, Draining())
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
        if record is None:
            log.error("job_deleted", job=job.record.id)
            self._abandon(job, Gone("This job was deleted."))
        elif record.state == ACCEPTED:
            log.warning("job_taken_over", job=job.record.id, by=record.replica)
            self._abandon(job, TakenOver())
        else:
            self.unwritten.pop(job.record.id, None)
            job.ended.set_result(record)
            del self.active[job.record.id]

    def _abandon(self, job: ActiveJob, reason: Draining | TakenOver | Gone) -> None:
        """The job stays unfinished, and is not this server's any more."""
        self.unwritten.pop(job.record.id, None)
        job.ended.set_exception(reason)
        job.ended.exception()  # looked at, whether or not anybody waits
        del self.active[job.record.id]

    def _note_other_engine(self, reply: GenerationReply, record: JobRecord) -> GenerationReply:
        """The reply, with a note if another engine drew it than the one that was there when it was accepted."""
        before, now = (record.request or {}).get("fingerprint"), self._state.fingerprint
        if before is None or before == now:
            return reply
        note = f"accepted by the engine {before} and drawn, after a restart, by {now}: the bytes may differ"
        notes = [*cast(list[str], reply.timings.get("notes", [])), note]
        return reply.model_copy(update={"timings": reply.timings | {"notes": notes}})
