"""Jobs that other servers of the same database carry out, as this one sees them: by looking into the database."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from pipelines.errors import Draining, PipelineError
from pipelines.job import EventChannel, Progress
from server.errors import ServerError
from server.jobs.models import JobRecord
from server.jobs.store import JobStore
from server.state import AppState

LOOK = 0.25  # seconds between looks at all jobs that somebody waits for


@dataclass(eq=False)
class WatchedJob:
    """A job that readers here wait for. Its channel closes when it has ended, or when `failure` says why not."""

    readers: int = 0
    channel: EventChannel = field(default_factory=EventChannel)
    failure: PipelineError | ServerError | None = None

    def close(self, failure: PipelineError | ServerError | None = None) -> None:
        self.failure = failure
        self.channel.close()


class RemoteJobs:
    """The jobs elsewhere that somebody waits for here, looked at together, by one query."""

    def __init__(self, store: JobStore, state: AppState) -> None:
        self._store = store
        self._state = state
        self._watched: dict[str, WatchedJob] = {}
        self._looking: asyncio.Task[None] | None = None

    async def follow(self, identity: str) -> AsyncIterator[Progress]:
        """What its server tells of its progress, until it has ended.

        Raises `Draining` if this server goes down before, and what the database raises.
        """
        watched = self._watched.setdefault(identity, WatchedJob())
        watched.readers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
        try:
            async for _, event in watched.channel.read():
                if isinstance(event, Progress):
                    yield event
            if watched.failure is not None:
                raise watched.failure
        finally:
            watched.readers -= 1
            if not watched.readers and self._watched.get(identity) is watched:
                del self._watched[identity]

    async def wait_ended(self, identity: str) -> None:
        """Raises as `follow` does."""
        async for _ in self.follow(identity):
            pass

    async def _look(self) -> None:
        try:
            await self._look_until_all_ended()
        finally:  # should it fail, nobody waits for ever
            for identity in list(self._watched):
                self._end(identity, Draining())

    async def _look_until_all_ended(self) -> None:
        while self._watched:
            identities = list(self._watched)
            try:
                if self._state.pool.status().state == "draining":
                    raise Draining
                unfinished = await self._state.threads.run("database", self._store.unfinished_among, identities)
            except (PipelineError, ServerError) as error:
                for identity in identities:
                    self._end(identity, error)
            else:
                for identity in identities:
                    if identity not in unfinished:
                        self._end(identity)
                    elif progress := unfinished[identity]:
                        self._publish(identity, Progress.from_json(progress))
            await asyncio.sleep(LOOK)

    def _end(self, identity: str, failure: PipelineError | ServerError | None = None) -> None:
        if watched := self._watched.pop(identity, None):
            watched.close(failure)

    def _publish(self, identity: str, progress: Progress) -> None:
        watched = self._watched.get(identity)
        if watched and watched.channel.latest() != progress:
            watched.channel.publish(progress)


def progress_of(record: JobRecord) -> Progress | None:
    """The newest that the job's server told."""
    return Progress.from_json(record.progress) if record.progress else None
