"""Pools of workers with the scripted engine, and what tests wait for in them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pipelines.engine.base import EngineConfig
from pipelines.job import Job
from pipelines.workers.patience import Patience
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers

LIMIT = 60.0  # seconds; nothing takes one on an idle machine


@asynccontextmanager
async def pool_of(
    model: str = "scripted",
    models_dir: Path = Path("models"),
    *,
    wait: bool = True,
    devices: Sequence[str] = (),
    patience: Patience = Patience(),  # noqa: B008
    **options: Any,
) -> AsyncIterator[WorkerPool]:
    """A started pool; with `wait`, once no worker is loading any more."""
    config = EngineConfig(model, str(models_dir), factory="support.scripted_engine:load")
    pool = WorkerPool(local_workers(config, devices, patience), **options)
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
