"""Requests that come at the same time begin one after the other, so that a burst of them holds up no probe.

Each request is some milliseconds of the event loop, in a few pieces. Where three hundred come at once, the loop would
run the first piece of each, then the second of each: whoever asks meanwhile waits for a whole round. Here one of them
begins in each round, and who need not wait for a turn (a probe) waits for the pieces of a few.
"""

import asyncio
from collections import deque


class Turns:
    """Of one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False  # in this round of the loop

    async def take(self) -> None:
        """Wait for a round of the loop in which nobody else begins; where nobody waits, that is this one."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next, loop)
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # whoever was cancelled meanwhile
                turn.set_result(None)
                loop.call_soon(self._next, loop)
                return
        self._taken = False
