"""Draws the requests of a batch with the checks and marks that the server applies."""

from collections.abc import Awaitable, Callable

from pipelines.job import Job, PreviewPlan
from pipelines.request import ImageResult
from pipelines.safety.guard import InspectedResult
from pipelines.workers.pool import WorkerPool
from server.batch.items import BatchItem
from server.engine_setup import build_guard, build_prompt_guard, build_signer
from server.images.source import Sources
from server.process.threads import ThreadPools
from server.settings.engine import EngineSettings


class Drawing:
    """The parts that a batch needs beside a pool. Raises `SafetyUnavailable`, `OSError` or `ValueError`."""

    def __init__(self, settings: EngineSettings, pool: WorkerPool, model: str) -> None:
        self.signer = build_signer(settings)
        self.guard = build_guard(settings)
        self._prompts = build_prompt_guard(settings)
        self.threads = ThreadPools()
        self._sources = Sources(self.threads, may_fetch=True)
        self._pool = pool
        self._model = model

    async def draw(
        self,
        item: BatchItem,
        previews: PreviewPlan = PreviewPlan(),  # noqa: B008 - frozen
        follow: Callable[[Job], Awaitable[ImageResult]] = Job.result,
    ) -> InspectedResult:
        """A request's images, checked. `follow` waits for them. Raises `PipelineError` or `UnusableImage`."""
        await self.threads.run("prompts", self._prompts.check, item.params.prompt)
        job = self._pool.submit(await item.request(self._model, self._sources, self.threads), previews)
        return await self.threads.run(
            "safety", self.guard.inspect, await follow(job), item.params.enable_safety_checker
        )
