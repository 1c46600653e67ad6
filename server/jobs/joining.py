"""A retry of an OpenAI SDK joins its first try, where that still runs: the same work is not done again beside it.

These SDKs send no idempotency key, but count their tries in a header. A client that has lost patience or its connection
comes back within seconds, so what it leaves behind goes on for as long; other clients' work is dropped at once.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from server.jobs.generation import Generation
from server.schema import GenerationReply

TRIES = "x-stainless-retry-count"
PAUSE = 10.0  # seconds that work outlives its client: the SDKs pause for at most 8 before a retry
REFUSED = 1000  # refused tries that are remembered


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
        self._refused: OrderedDict[RequestIdentity, int] = OrderedDict()

    def find(self, identity: RequestIdentity, tries: str) -> SharedGeneration | None:
        """The first try of a retry: of equal ones the one that fewest wait for, and of those the oldest.

        None where the first try was refused: equal ones that others wait for are theirs.
        """
        if not tries.isdecimal() or int(tries[:9]) == 0:
            return None
        found = min(self._open.get(identity, []), key=lambda shared: shared.waiting, default=None)
        return None if found is not None and found.waiting and self._forget_refusal(identity) else found

    @contextmanager
    def starting(self, identity: RequestIdentity | None) -> Iterator[None]:
        """Remember, where what is done in it fails, that the try was refused: its retry has nothing to join."""
        try:
            yield
        except BaseException:
            if identity is not None:
                self._refused[identity] = self._refused.pop(identity, 0) + 1
                while len(self._refused) > REFUSED:
                    self._refused.popitem(last=False)
            raise

    def _forget_refusal(self, identity: RequestIdentity) -> bool:
        """Whether a try was refused of which no retry has come yet; one fewer from now on."""
        if not (refused := self._refused.pop(identity, 0)):
            return False
        if refused > 1:
            self._refused[identity] = refused - 1
        return True

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
