"""Limits on blocking work: a long line is no fault, threads that hang are."""

import asyncio
import threading
import time

import pytest

from server.process.threads import POOLS, ThreadPools

LIMIT = 5.0  # seconds
CALLS = 30


async def test_a_call_may_wait_longer_than_its_limit_for_others_that_are_quick() -> None:
    threads = ThreadPools()
    waits = [threads.run_within(LIMIT, "decoding", time.sleep, 1.5 * LIMIT / CALLS) for _ in range(CALLS)]
    assert await asyncio.gather(*waits) == [None] * CALLS
    threads.close()


async def test_nobody_waits_for_threads_that_hang() -> None:
    threads, end = ThreadPools(), threading.Event()
    try:
        calls = [threads.run_within(0.2, "decoding", end.wait) for _ in range(POOLS["decoding"] + 2)]
        assert [type(ended) for ended in await asyncio.gather(*calls, return_exceptions=True)] == [TimeoutError] * 3
        with pytest.raises(TimeoutError):
            await threads.run_within(0.2, "decoding", print, "never")
        end.set()
        assert await threads.run_within(10 * LIMIT, "decoding", len, "abc") == 3
    finally:
        end.set()
        threads.close()
