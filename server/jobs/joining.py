"""A retry of an OpenAI SDK joins its first try, where that still runs: the same work is not done again beside it.

These SDKs send no idempotency key, but count their tries in a header. A client that has lost patience or its connection
comes back within seconds, so what it leaves behind goes on for as long; other clients' work is dropped at once.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from server.jobs.generation import Generation
from server.schema import GenerationReply

TRIES = "x-stainless-retry-count"
PAUSE = 10.0  # seconds that work outlives its client: the SDKs pause for at most 8 before a retry


class RequestIdentity(NamedTuple):
    """What a retry has in common with its first try: whose it is, and the hash of its body."""

    owner: str
    body_hash: str


class SharedGeneration:
    """A generation, and how many requests wait for its reply. Without any it ends, `pause` seconds later."""

    def __init__(self, generation: Generation, pause: float, on_end: Callable[["SharedGeneration"], None]) -> None:
        self.generation = generation
        self.waiting = 0
        self._pause = pause
        self._on_end = on_end
        self._replying = asyncio.ensure_future(generation.reply())
        self._replying.add_done_callback(lambda done: done.cancelled() or done.exception())  # looked at, whoever waits
        self._ending: asyncio.TimerHandle | None = None

    async def reply(self) -> GenerationReply:
        """The finished images. Raises what went wrong. Cancelling the wait does not cancel the work."""
        return await asyncio.shield(self._replying)

    def join(self) -> None:
        """One more waits, and calls `leave` at the end."""
        self.waiting += 1
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def leave(self) -> None:
        self.waiting -= 1
        if self.waiting:
            return
        if self._replying.done() or not self._pause:
            self._end()
        else:
            self._ending = asyncio.get_running_loop().call_later(self._pause, self._end)

    def _end(self) -> None:
        self.generation.cancel()  # nothing to do if it has ended
        self._replying.cancel()
        self._on_end(self)


class Joins:
    """The generations that a retry can join."""

    def __init__(self) -> None:
        self._open: dict[RequestIdentity, list[SharedGeneration]] = {}

    def find(self, identity: RequestIdentity, tries: str) -> SharedGeneration | None:
        """The first try of a retry: of equal ones the one that fewest wait for, and of those the oldest."""
        is_retry = tries.isdecimal() and int(tries[:9]) > 0
        return min(self._open.get(identity, []), key=lambda shared: shared.waiting, default=None) if is_retry else None

    def open(self, identity: RequestIdentity | None, generation: Generation) -> SharedGeneration:
        """Share a generation with retries, until nobody waits for it; with nobody where it has no identity."""
        if identity is None:
            return SharedGeneration(generation, 0.0, lambda _: None)
        shared = SharedGeneration(generation, PAUSE, lambda ended: self._close(identity, ended))
        self._open.setdefault(identity, []).append(shared)
        return shared

    def _close(self, identity: RequestIdentity, ended: SharedGeneration) -> None:
        self._open[identity].remove(ended)
        if not self._open[identity]:
            del self._open[identity]
