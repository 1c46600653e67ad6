"""What is done at intervals while the server runs."""

import asyncio
import time
from dataclasses import asdict

import structlog

from pipelines.job import Progress
from pipelines.workers.status import SERVING
from server.errors import StorageFailure
from server.jobs.leases import JobLeases
from server.jobs.resumption import resume_jobs
from server.jobs.runner import JobRunner
from server.jobs.store import JobStore
from server.state import AppState

INTERVAL = 1.0  # seconds between looks
SWEEP_INTERVAL = 60.0  # seconds
KEEP_INTERVAL = 5.0  # seconds
RENEWALS = 3  # within the time of a lease: one that fails is no loss
TAKEN_AT_ONCE = 4  # jobs: the rest is left to other servers, until these have their place in the line
log = structlog.get_logger("srpo")


class Upkeep:
    """The duties of one server towards its jobs, its database and those who share it.

    `failure` is why the database could not be used at the last look, where there are others to be told of it.
    """

    def __init__(self, runner: JobRunner, store: JobStore, leases: JobLeases, state: AppState) -> None:
        self.failure: StorageFailure | None = None
        self._runner = runner
        self._store = store
        self._leases = leases
        self._state = state
        self._told: dict[str, Progress] = {}
        self._resuming: asyncio.Task[None] | None = None
        self._renewed = float("-inf")  # on the monotonic clock
        self._patient_until = float("-inf")  # before that no job is taken over

    async def run(self) -> None:
        """Never ends."""
        while True:
            try:
                await self._look()
                self.failure = None
            except StorageFailure as error:
                log.error("jobs", error=type(error).__name__)
                if self._state.database.shared:
                    self.failure = error
                    # Nobody could renew a lease, so those that have run out say nothing of their servers.
                    self._patient_until = time.monotonic() + self._leases.seconds
            await asyncio.sleep(INTERVAL)

    def stop(self) -> None:
        if self._resuming is not None:
            self._resuming.cancel()

    async def _look(self) -> None:
        if self._runner.active:
            self._cancel(
                await self._state.threads.run("database", self._store.cancelled_among, list(self._runner.active))
            )
        if self._state.database.shared:
            if self.failure is not None:  # without work there may be nothing else to ask it
                await self._state.threads.run("database", self._state.database.ask)
            await self._renew_leases()
            await self._tell_progress()
            await self._take_over()

    def _cancel(self, identities: set[str]) -> None:
        """Stop the work of jobs that were cancelled elsewhere, or taken over."""
        for identity in identities & set(self._runner.active):
            self._runner.cancel(self._runner.active[identity])

    async def _renew_leases(self) -> None:
        if self._runner.active and time.monotonic() > self._renewed + self._leases.seconds / RENEWALS:
            self._cancel(await self._state.threads.run("database", self._leases.renew, list(self._runner.active)))
            self._renewed = time.monotonic()

    async def _tell_progress(self) -> None:
        """What has changed since it was last told; predicted seconds alone are no news."""
        latest = {
            identity: progress
            for identity, job in self._runner.active.items()
            if job.admitted and (progress := job.admitted.channel.latest())
        }
        news = {name: now for name, now in latest.items() if not is_same(self._told.get(name), now)}
        self._told = {name: now for name, now in self._told.items() if name in latest}
        if news:
            await self._state.threads.run(
                "database", self._leases.tell, {name: asdict(now) for name, now in news.items()}
            )
            self._told |= news

    async def _take_over(self) -> None:
        """Resume jobs of servers that are gone, a few at a time, so that all who are left share them."""
        busy = self._resuming is not None and not self._resuming.done()
        if busy or time.monotonic() < self._patient_until or self._state.pool.status().state not in SERVING:
            return
        ours = list(self._runner.active)
        records = await self._state.threads.run("database", self._leases.take_over, TAKEN_AT_ONCE, ours)
        if records:
            log.warning("jobs_taken_over", jobs=[record.id for record in records])
            jobs = [self._runner.register(record) for record in records]
            self._resuming = asyncio.ensure_future(resume_jobs(jobs, self._runner, self._store, self._state))


async def maintain_database(state: AppState, store: JobStore) -> None:
    """Delete what has expired. Never ends. That it fails says nothing of whether jobs can be accepted."""
    while True:
        try:
            await state.threads.run("database", store.sweep, state.settings.images_expire)
            await state.threads.run("database", state.database.shrink)
        except StorageFailure as error:
            log.error("jobs_not_swept", error=type(error).__name__)
        await state.threads.run("database", state.clock.save)
        await asyncio.sleep(SWEEP_INTERVAL)


async def maintain_images(state: AppState) -> None:
    """Look after the store of images. Never ends."""
    while True:
        try:
            await state.threads.run("storing", state.store.maintain)
        except StorageFailure as error:
            log.error("images", error=type(error).__name__)
        await asyncio.sleep(KEEP_INTERVAL)


def is_same(before: Progress | None, now: Progress) -> bool:
    fields = ("stage", "image", "step", "steps", "position")
    return before is not None and all(getattr(before, name) == getattr(now, name) for name in fields)
