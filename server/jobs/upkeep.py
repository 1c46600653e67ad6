"""What is done at intervals while the server runs."""

import asyncio
import time

import structlog

from server.data_folder import FolderClock
from server.errors import StorageBusy, StorageDamaged, StorageFull
from server.jobs.runner import JobRunner
from server.jobs.store import JobStore
from server.threads import ThreadPools

INTERVAL = 1.0  # seconds between looks for cancellations
SWEEP_INTERVAL = 60.0  # seconds
log = structlog.get_logger("srpo")


async def maintain(runner: JobRunner, store: JobStore, pools: ThreadPools, clock: FolderClock, expire: float) -> None:
    """Cancel what `srpo jobs` has marked as cancelled, and expire jobs that ended `expire` seconds ago. Never ends."""
    swept = float("-inf")
    while True:
        try:
            if runner.active:
                cancelled = await pools.run("ledger", store.cancelled_among, list(runner.active))
                for identity in cancelled & set(runner.active):
                    runner.active[identity].cancel()
            if time.monotonic() > swept + SWEEP_INTERVAL:
                await pools.run("ledger", store.sweep, expire)
                await pools.run("ledger", store.shrink)
                await pools.run("ledger", clock.keep)
                swept = time.monotonic()
        except (StorageBusy, StorageDamaged, StorageFull) as error:
            log.error("jobs", error=type(error).__name__)
        await asyncio.sleep(INTERVAL)
