"""A request on its way through the pool, as its caller holds it."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from pipelines.errors import PipelineError
from pipelines.request import ImageRequest, ImageResult


@dataclass(frozen=True, slots=True)
class Step:
    """Image `image` of the job has finished step `step` of `steps`."""

    image: int
    step: int
    steps: int


@dataclass(eq=False)
class Job:
    """An admitted request. Await `result()`; iterate `events()` to watch the steps."""

    id: str
    request: ImageRequest
    deadline: float  # on the monotonic clock
    admitted: float = field(default_factory=time.monotonic)
    dispatched: float | None = None
    crashes: int = 0
    pixels: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._result: asyncio.Future[ImageResult] = asyncio.get_running_loop().create_future()
        self._events: asyncio.Queue[Step | None] = asyncio.Queue()

    @property
    def finished(self) -> bool:
        return self._result.done()

    async def result(self) -> ImageResult:
        """The finished images; raises a `PipelineError`. Cancelling the wait does not cancel the job."""
        return await asyncio.shield(self._result)

    async def events(self) -> AsyncIterator[Step]:
        """The steps as they are done, until the job ends. One reader."""
        while (step := await self._events.get()) is not None:
            yield step

    def publish(self, step: Step) -> None:
        self._events.put_nowait(step)

    def finish(self, outcome: ImageResult | PipelineError) -> None:
        """End the job; later outcomes are ignored (a cancelled job may still be answered by its worker)."""
        if self.finished:
            return
        if isinstance(outcome, ImageResult):
            self._result.set_result(outcome)
        else:
            self._result.set_exception(outcome)
            self._result.exception()  # looked at: a caller that went away must not make asyncio complain
        self._events.put_nowait(None)
