"""A job: a request that the pool has admitted, its events and its result, as the caller holds it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any

from pipelines.errors import PipelineError
from pipelines.request import ImageRequest, ImageResult, Stage, Timings

EVENT_CAPACITY = 128  # for a reader that is slow or comes late; the oldest go first


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. `step` of `steps` are done in image `image`; `eta` is in seconds, to the job's end.

    `stage` is `queued`, `waking` (queued for a worker that has slept), `text`, `denoise` or `decode`, and after the
    pool `safety` or `encode`. `position` counts the jobs ahead in the queue.
    """

    stage: str
    image: int = 0
    step: int = 0
    steps: int = 0
    position: int = 0
    eta: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Progress":
        """As another process has it, which may be of a newer version: what is not known here is left out."""
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


@dataclass(frozen=True, slots=True)
class Preview:
    """A rough small picture of image `image` on its way, the `index`-th of it: 8-bit RGB, row-major."""

    image: int
    index: int
    width: int
    height: int
    pixels: bytes


Event = Progress | Preview


@dataclass(frozen=True, slots=True)
class PreviewPlan:
    """How many previews each image gets (evenly spread over its steps), and the longest side they may have."""

    count: int = 0
    side: int = 0

    def steps(self, total: int) -> tuple[int, ...]:
        """The steps after which there is one, of `total`; never the last, after which the image itself comes."""
        return tuple(sorted({total * (index + 1) // (self.count + 1) for index in range(self.count)} - {0, total}))


class EventChannel:
    """Events, numbered from 1, for any number of readers. Writing never waits; a late reader misses the oldest."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, Event]] = deque(maxlen=EVENT_CAPACITY)
        self._numbers = count(1)
        self._news = asyncio.Event()
        self._closed = False

    def publish(self, event: Event) -> None:
        if not self._closed:
            self._kept.append((next(self._numbers), event))
            self._wake()

    def close(self) -> None:
        self._closed = True
        self._wake()

    def latest(self) -> Progress | None:
        """The newest progress."""
        return next((event for _, event in reversed(self._kept) if isinstance(event, Progress)), None)

    async def read(self, after: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """What is kept, then what comes, each with its number (rising); those up to `after` are passed over."""
        while True:
            news = self._news
            for number, event in [item for item in self._kept if item[0] > after]:
                after = number
                yield number, event
            if news is self._news:
                if self._closed:
                    return
                await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


@dataclass(eq=False)
class Job:
    """An admitted request. Await `result()`; iterate `events()` to watch it.

    The channel closes when the job ends, unless it is the caller's (`owns_channel` is false): the caller then goes on
    publishing to it, and closes it.
    """

    id: str
    request: ImageRequest
    deadline: float  # on the monotonic clock
    previews: PreviewPlan = PreviewPlan()
    tenant: str = ""  # with whose jobs it shares a place in the line
    admitted: float = field(default_factory=time.monotonic)
    dispatched: float | None = None
    suspect: bool = False  # its worker died in a step of this job
    crashes: int = 0  # how often that happened while no other job was in the step
    remaining_fraction: float = 1.0  # of its steps
    pixels: dict[int, bytes] = field(default_factory=dict)
    channel: EventChannel = field(default_factory=EventChannel)
    owns_channel: bool = True

    def __post_init__(self) -> None:
        self._result: asyncio.Future[ImageResult] = asyncio.get_running_loop().create_future()

    @property
    def finished(self) -> bool:
        return self._result.done()

    def add_wait(self, timings: Timings) -> Timings:
        """A worker's timings, with the time that the job has waited for it."""
        return replace(timings, queue=timings.queue + (self.dispatched or self.admitted) - self.admitted)

    def build_result(self, timings: Timings, stages: tuple[Stage, ...], notes: tuple[str, ...]) -> ImageResult:
        """The images that have come, with what the worker says of them."""
        pixels = tuple(self.pixels[index] for index in range(len(self.request.seeds)))
        return ImageResult(self.request, pixels, self.add_wait(timings), notes, stages)

    async def result(self) -> ImageResult:
        """The finished images; raises a `PipelineError`. Cancelling the wait does not cancel the job."""
        return await asyncio.shield(self._result)

    def drop_pixels(self) -> None:
        """Of a job with images, when these have been encoded: its memory is free. Its result has none any more."""
        result = replace(self._result.result(), pixels=())
        self.pixels.clear()
        self._result = self._result.get_loop().create_future()
        self._result.set_result(result)

    async def events(self) -> AsyncIterator[Event]:
        """The job's events, until it ends."""
        async for _, event in self.channel.read():
            yield event

    def publish(self, event: Event) -> None:
        self.channel.publish(event)

    def finish(self, outcome: ImageResult | PipelineError) -> None:
        """End the job; later outcomes are ignored (a cancelled job may still be answered by its worker)."""
        if self.finished:
            return
        if isinstance(outcome, ImageResult):
            self._result.set_result(outcome)
        else:
            self._result.set_exception(outcome)
            self._result.exception()  # marks it as retrieved: a caller that went away must not make asyncio warn
        if self.owns_channel:
            self.channel.close()
