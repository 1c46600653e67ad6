"""Pools of workers with the scripted engine, and what tests wait for in them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pipelines.engine.base import EngineConfig
from pipelines.job import Job
from pipelines.workers.pool import WorkerPool

LIMIT = 60.0  # seconds; nothing takes one on an idle machine


@asynccontextmanager
async def pool_of(
    model: str = "scripted", models_dir: Path = Path("models"), *, wait: bool = True, **options: Any
) -> AsyncIterator[WorkerPool]:
    """A started pool; with `wait`, once no worker is loading any more."""
    pool = WorkerPool(EngineConfig(model, str(models_dir), factory="support.scripted_engine:load"), **options)
    await pool.start()
    try:
        if wait:
            await until(lambda: not {worker.state for worker in pool.status().workers} & {"loading"})
        yield pool
    finally:
        await pool.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.01)


async def result_of(job: Job) -> tuple[bytes, ...]:
    async with asyncio.timeout(LIMIT):
        return (await job.result()).pixels
