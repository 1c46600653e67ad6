"""What is done at intervals while the server runs."""

import asyncio
import time

import structlog

from server.errors import StorageBusy, StorageDamaged, StorageFull
from server.jobs.runner import JobRunner
from server.jobs.store import JobStore
from server.state import AppState

INTERVAL = 1.0  # seconds between looks for cancellations
SWEEP_INTERVAL = 60.0  # seconds
log = structlog.get_logger("srpo")


async def maintain(runner: JobRunner, store: JobStore, state: AppState) -> None:
    """Cancel what `srpo jobs` has marked as cancelled, and expire jobs as old as their images may be. Never ends."""
    pools = state.pools
    swept = float("-inf")
    while True:
        try:
            if runner.active:
                cancelled = await pools.run("ledger", store.cancelled_among, list(runner.active))
                for identity in cancelled & set(runner.active):
                    runner.active[identity].cancel()
            if time.monotonic() > swept + SWEEP_INTERVAL:
                await pools.run("ledger", store.sweep, state.settings.images_expire)
                await pools.run("ledger", state.database.shrink)
                await pools.run("ledger", state.clock.keep)
                swept = time.monotonic()
        except (StorageBusy, StorageDamaged, StorageFull) as error:
            log.error("jobs", error=type(error).__name__)
        await asyncio.sleep(INTERVAL)
