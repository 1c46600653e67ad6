"""The threads that blocking work runs in: a pool of its own for each thing that may have to wait.

Whoever is slow holds up nobody else. A moderation service that drips its answer takes the threads that ask moderation
services, and no image file waits for one of them; a locked database holds up only what reads and writes it.
`asyncio.to_thread`, whose one pool serves everybody, is refused by the linter in `server/`.
"""

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial, wraps
from threading import Lock
from typing import Literal, ParamSpec, TypeVar

PoolName = Literal[
    "files",
    "storing",
    "database",
    "rates",
    "encoding",
    "prompts",
    "safety",
    "bodies",
    "fetching",
    "decoding",
    "metrics",
    "traces",
    "webhooks",
]
POOLS: Mapping[PoolName, int] = {  # threads each
    "files": 4,  # reading stored images, for anybody who knows a name
    "storing": 4,  # writing them
    "database": 4,  # which another program may have locked
    "rates": 2,  # the database too, for the requests a minute of keys: many of one key wait for its row
    "encoding": 4,  # pixels to files, replies to JSON
    "prompts": 8,  # the operator's prompt list and prompt hook
    "safety": 4,  # the checker of images, which may be a hook too
    "bodies": 2,  # parsing and hashing large requests
    "fetching": 8,  # source pictures from hosts that clients name
    "decoding": 1,  # source pictures: one at a time, each takes much memory
    "webhooks": 8,  # receivers that clients name
    "metrics": 1,  # what a scrape reads from the disk, the database and the driver, which may hang
    "traces": 1,  # sending the last ones
}
P = ParamSpec("P")
R = TypeVar("R")


class ThreadPools:
    """The pools of one app, by name."""

    def __init__(self) -> None:
        self._pools = {name: ThreadPoolExecutor(size, name) for name, size in POOLS.items()}
        self._running: Counter[PoolName] = Counter()
        self._waiting: Mapping[PoolName, dict[asyncio.Timeout, float]] = {name: {} for name in POOLS}
        self._lock = Lock()

    async def run(self, pool: PoolName, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result, from a thread of `pool`. If the wait is cancelled, a call that has begun goes on."""
        call = partial(contextvars.copy_context().run, self._count, pool, partial(function, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._pools[pool], call)

    async def run_within(
        self, seconds: float, pool: PoolName, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """As `run`. Raises `TimeoutError` if the call takes longer than that, or none of the pool begins for as long.

        So a call may wait for many others that are quick, and never for threads that all hang.
        """
        loop, waiting = asyncio.get_running_loop(), self._waiting[pool]

        def begin(limit: asyncio.Timeout) -> None:
            for other in waiting:
                if not other.expired():
                    other.reschedule(loop.time() + waiting[other])
            waiting.pop(limit, None)

        @wraps(function)  # whoever measures calls knows them by name
        def call(limit: asyncio.Timeout) -> R:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(begin, limit)
            return function(*args, **kwargs)

        async with asyncio.timeout(seconds) as limit:
            waiting[limit] = seconds
            try:
                return await self.run(pool, call, limit)
            finally:
                waiting.pop(limit, None)

    def running(self) -> dict[PoolName, int]:
        """How many calls each pool is carrying out now, of those that carry out any."""
        with self._lock:
            return {name: count for name, count in self._running.items() if count}

    def close(self) -> None:
        """Begin no more calls. Does not wait for those that have begun: nothing can end a thread but itself."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _count(self, pool: PoolName, call: Callable[[], R]) -> R:
        with self._lock:
            self._running[pool] += 1
        try:
            return call()
        finally:
            with self._lock:
                self._running[pool] -= 1
