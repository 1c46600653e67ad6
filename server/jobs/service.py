"""Requests that outlive their client and their server: accepted once, finished once.

The store knows what was accepted and how it ended; the runner carries it out.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from weakref import WeakValueDictionary

from pipelines.duties import keep_running
from pipelines.errors import Draining
from pipelines.job import Progress
from pipelines.request import ImageRequest
from server.errors import Gone, KeyReused, NotFound, ServerError, StorageFailure
from server.jobs.delivery import needs_files, restore_reply
from server.jobs.generation import Generation, check_prompt
from server.jobs.joining import Joins
from server.jobs.leases import JobLeases
from server.jobs.models import ACCEPTED, EXPIRED, SUCCEEDED, JobRecord, WebhookDelivery
from server.jobs.remote import RemoteJobs
from server.jobs.resumption import resume_jobs
from server.jobs.runner import ActiveJob, JobRunner, TakenOver
from server.jobs.spec import JobSpec
from server.jobs.store import JobStore, KeyTaken
from server.jobs.upkeep import Upkeep, maintain_database, maintain_images
from server.jobs.webhooks import WebhookSender
from server.security.callers import Caller
from server.state import AppState


class JobService:
    """All durable jobs of one server."""

    def __init__(self, state: AppState, store: JobStore) -> None:
        self.epoch = secrets.token_hex(4)  # event numbers begin anew with every process
        self.finish_by = 0.0  # monotonic seconds: until then a server that stops waits for running jobs
        self.joins = Joins()
        self.threads = state.threads
        self._state = state
        self._store = store
        self._leases = JobLeases(state.database, state.settings.lease)
        self._runner = JobRunner(state, store)
        self._remote = RemoteJobs(store, state)
        self._upkeep = Upkeep(self._runner, store, self._leases, state)
        self.webhooks = WebhookSender(state)
        self._key_locks = WeakValueDictionary[tuple[str, str], asyncio.Lock]()  # while a request of the key is accepted

    async def start(self) -> None:
        """Open the database and resume what was left unfinished; where others share it, `Upkeep` does it by and by."""
        database = self._state.database
        await self.threads.run("database", database.open)
        records = [] if database.shared else await self.threads.run("database", self._leases.take_over, None)
        jobs = [self._runner.register(record) for record in records]
        resuming = resume_jobs(jobs, self._runner, self._store, self._state)
        duties = (
            keep_running("jobs", self._upkeep.run),
            keep_running("sweeps", partial(maintain_database, self._state, self._store)),
            keep_running("images", partial(maintain_images, self._state)),
            keep_running("webhooks", self.webhooks.run),
        )
        self._background = [asyncio.ensure_future(work) for work in (resuming, *duties)]

    async def finish(self) -> None:
        """Let what is being drawn end, until `finish_by`. Call it before the pool stops."""
        await self._runner.finish_running(self.finish_by - time.monotonic())

    async def stop(self) -> None:
        """Call it when the pool has stopped. What is unfinished stays in the store."""
        for task in self._background:
            task.cancel()
        self._upkeep.stop()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.webhooks.stop()
        await self._runner.stop()
        with suppress(StorageFailure):  # then they are taken over when their leases end
            await self.threads.run("database", self._leases.release)

    async def accept(self, spec: JobSpec, caller: Caller, key: str | None, body_hash: str) -> tuple[JobRecord, bool]:
        """Admit a request and write it down, or find the one that has its key. True: it had been accepted before.

        Raises `KeyReused`, a `StorageFailure`, and what `Generation.start` raises before any work.
        """
        if key is None:
            request = await self._build_request(spec, caller)
            admission = asyncio.ensure_future(self._admit(spec, request, caller, None, body_hash))
            return await asyncio.shield(admission), False  # a row without its generation would wait for a restart
        return await asyncio.shield(asyncio.ensure_future(self._accept_once(spec, caller, key, body_hash)))

    async def find(self, identity: str, owner: str) -> tuple[JobRecord, ActiveJob | None]:
        """A job of this owner's. Raises `NotFound` or `Gone`."""
        job = self.active(identity)
        record = job.record if job else await self.threads.run("database", self._store.find, identity)
        if record is None or record.owner != owner:
            raise NotFound("There is no such job.")
        if record.state == EXPIRED:
            raise Gone("This job has expired.")
        return record, job

    async def page(self, owner: str, limit: int, after: str | None, states: tuple[str, ...]) -> list[JobRecord]:
        """At most `limit` jobs of this owner's in these states, newest first, from behind the job `after`."""
        before = (await self.find(after, owner))[0].number if after else None
        return await self.threads.run("database", self._store.page, owner, limit, before, states)

    @property
    def replica(self) -> str:
        """The name of this server process among those that share its database."""
        return self._leases.replica

    @property
    def unwritten(self) -> int:
        """How many jobs are over while that cannot be written down."""
        return len(self._runner.unwritten)

    def count_by_state(self) -> dict[str, int]:
        """How many jobs the database has in each state. Call it in a thread. Raises what the store raises."""
        return self._store.count_by_state()

    def find_trouble(self) -> str | None:
        """Why jobs cannot be accepted, or their end not be written down now."""
        unwritten = self._runner.unwritten
        if not unwritten:
            failure = self._upkeep.failure or self._state.store.failure
            return str(failure) if failure else None
        error = next(iter(unwritten.values()))
        reason = error if isinstance(error, ServerError) else type(error).__name__  # it may show what was asked for
        return f"the outcomes of {len(unwritten)} requests cannot be written down: {reason}"

    def active(self, identity: str) -> ActiveJob | None:
        """The job, if it is unfinished and of this process."""
        return self._runner.active.get(identity)

    async def wait_ended(self, record: JobRecord) -> JobRecord:
        """The job when it is over. Raises `Draining` if the server goes down before, `Gone` if it was deleted."""
        if job := self.active(record.id):
            with suppress(TakenOver):
                return await asyncio.shield(job.ended)
        found = await self.threads.run("database", self._store.find, record.id)
        if found is not None and self.is_elsewhere(found):
            await self._remote.wait_ended(record.id)
            found = await self.threads.run("database", self._store.find, record.id)
        if found is None or found.state == ACCEPTED:
            raise Draining
        return found

    def is_elsewhere(self, record: JobRecord) -> bool:
        """Whether another server carries the job out."""
        return record.state == ACCEPTED and self._state.database.shared and self.active(record.id) is None

    def follow_elsewhere(self, record: JobRecord) -> AsyncIterator[Progress]:
        """The progress of a job that another server carries out, until it has ended. Raises as `wait_ended` does."""
        return self._remote.follow(record.id)

    async def read_outcome(self, record: JobRecord) -> str:
        """The body that the request of a job that has ended is answered with: its reply, or its error's envelope.

        Raises `Gone` if the reply holds images that have expired, and what the store raises.
        """
        outcome = record.outcome or "{}"
        if record.state != SUCCEEDED or not needs_files(record.pictures, self._state.store):
            return outcome
        return await self.threads.run("files", restore_reply, outcome, record.pictures, self._state.store)

    async def cancel(self, identity: str, owner: str) -> JobRecord:
        """Cancel a job; one that has ended stays as it is."""
        record, job = await self.find(identity, owner)
        if job is not None:
            self._runner.cancel(job)
            with suppress(TakenOver):
                return await asyncio.shield(job.ended)
        elif record.state != ACCEPTED:
            return record
        await self.threads.run("database", self._store.cancel, identity)  # another server's, which looks for this
        return await self.wait_ended(record)

    async def _accept_once(self, spec: JobSpec, caller: Caller, key: str, body_hash: str) -> tuple[JobRecord, bool]:
        lock = self._key_locks.setdefault((caller.owner, key), asyncio.Lock())
        async with lock:  # a source picture is not fetched for a second answer
            if known := await self._find_key(caller.owner, key, body_hash):
                return known, True
        request = await self._build_request(spec, caller)
        while True:
            async with lock:
                if known := await self._find_key(caller.owner, key, body_hash):
                    return known, True
                with suppress(KeyTaken):  # another server was quicker: its job is the one to find
                    return await self._admit(spec, request, caller, key, body_hash), False

    async def _build_request(self, spec: JobSpec, caller: Caller) -> ImageRequest:
        await check_prompt(spec.body.prompt, self._state)
        return await spec.build_request(self._state, caller)

    async def _find_key(self, owner: str, key: str, body_hash: str) -> JobRecord | None:
        record = await self.threads.run("database", self._store.find_key, owner, key)
        if record is not None and record.body_hash != body_hash:
            raise KeyReused
        return record

    async def _admit(
        self, spec: JobSpec, request: ImageRequest, caller: Caller, key: str | None, body_hash: str
    ) -> JobRecord:
        self._check_store()
        quota = self._state.limits.images_per_day(caller)
        if quota is not None:  # looked at again with what is written down; no work begins for what is refused anyway
            await self.threads.run("database", self._state.usage.ledger.check, caller.owner, len(request.seeds), quota)
        spec.release_source()
        spec.fingerprint = self._state.fingerprint
        generation = Generation.start(self._state, spec, request, caller, durable=True)
        identity = f"job_{secrets.token_hex(16)}"
        record = JobRecord(identity, caller.owner, key, body_hash, spec.to_json(request), created=time.time())
        # None is set too: what is not set cannot be read any more once the record is written down.
        record.webhook = WebhookDelivery(identity, caller.owner, *spec.webhook) if spec.webhook else None
        self._leases.grant(record)
        try:
            source = request.source.pixels if request.source else None
            await self.threads.run("database", self._store.add, record, source, quota, len(request.seeds))
        except Exception:
            generation.cancel()
            raise
        self._runner.run(self._runner.register(record), generation)
        return record

    def _check_store(self) -> None:
        """Raises the failure of a store that takes nothing, where as many jobs are unfinished as the pool has places.

        It does not count those that are drawn and wait for the store, with their images in memory.
        """
        failure = self._state.store.failure
        if failure is not None and len(self._runner.active) >= self._state.pool.capacity:
            raise type(failure)
