"""What is measured of one admitted request, for the metrics and for its trace: its stages, its images, its end."""

import asyncio
import time
from collections.abc import Mapping

from pipelines.errors import Cancelled, ContentWithheld
from pipelines.request import ImageRequest, ImageResult
from pipelines.safety.guard import InspectedResult
from server.error_table import row_of
from server.metrics.recorder import FLAGGED, Metrics
from server.metrics.table import (
    E2E_LATENCY,
    IMAGE_PIXELS,
    IMAGES,
    IMAGES_CHECKED,
    KEY_CREDITS,
    KEY_DEVICE_SECONDS,
    KEY_IMAGES,
    KEY_PIXELS,
    KEY_REQUESTS,
    QUEUE_WAIT,
    REQUESTS_ADMITTED,
    REQUESTS_FINISHED,
    STAGE_SECONDS,
    size_class,
)
from server.tracing.traces import Traces
from server.usage.ledger import UsageEntry

KEY = "key_"  # what the ids of the database's keys begin with


def label_of(owner: str) -> str:
    """A key's id. Keys of the settings have one label together: a hash says something of a key that is short."""
    return owner if owner.startswith(KEY) else "settings" if owner else "none"


class GenerationMeter:
    """Begins with the admission. Of several ends only the first counts.

    `named`: the model as the client called it; `trace`: the headers of the trace that the request belongs to.
    """

    def __init__(
        self, metrics: Metrics, traces: Traces, request: ImageRequest, named: str, trace: Mapping[str, str]
    ) -> None:
        self._metrics = metrics
        self._span = traces.begin_generation(request, named, trace)
        self._request = request
        self._admitted = time.monotonic()
        self._ended = False
        metrics.count(REQUESTS_ADMITTED)

    def enter(self) -> None:
        """What the current task calls from now on belongs to the generation's trace."""
        self._span.enter()

    def stage(self, name: str, seconds: float) -> None:
        """A stage after the device's has just ended."""
        self._metrics.observe(STAGE_SECONDS, seconds, name)
        self._span.add_stage(name, seconds)

    def draw(self, result: ImageResult) -> None:
        """The device has just finished."""
        timings = result.timings
        self._metrics.observe(QUEUE_WAIT, timings.queue)
        for name, seconds in (("text", timings.text), ("denoise", timings.denoise), ("decode", timings.decode)):
            self._metrics.observe(STAGE_SECONDS, seconds, name)
        self._span.add_device_stages(result)

    def succeed(self, inspected: InspectedResult, usage: UsageEntry) -> None:
        """The reply is complete."""
        if not self._end("succeeded", ""):
            return
        request = self._request
        labels = size_class(request.pixels), request.acceleration
        self._metrics.observe(E2E_LATENCY, time.monotonic() - self._admitted, *labels)
        self._metrics.count(IMAGES, *labels, by=len(request.seeds))
        self._metrics.count(IMAGE_PIXELS, by=request.pixels * len(request.seeds))
        self._count_usage(usage)
        if inspected.verdict.checked:
            self._count_checked(inspected.flagged)

    def fail(self, error: Exception | asyncio.CancelledError) -> None:
        """There will be no reply; `error` says why."""
        if isinstance(error, asyncio.CancelledError | Cancelled):
            self._end("cancelled", row_of(Cancelled()).code or "")
        elif self._end("failed", row_of(error).code or "") and isinstance(error, ContentWithheld):
            self._count_checked((True,) * len(self._request.seeds))

    def _count_usage(self, usage: UsageEntry) -> None:
        key = label_of(usage.owner)
        self._metrics.count(KEY_REQUESTS, key)
        self._metrics.count(KEY_IMAGES, key, by=usage.images)
        self._metrics.count(KEY_PIXELS, key, by=usage.pixels)
        self._metrics.count(KEY_DEVICE_SECONDS, key, by=usage.device_seconds)
        self._metrics.count(KEY_CREDITS, key, by=usage.credits)

    def _count_checked(self, flagged: tuple[bool, ...]) -> None:
        for flag in flagged:
            self._metrics.count(IMAGES_CHECKED, FLAGGED[flag])

    def _end(self, outcome: str, code: str) -> bool:
        """Whether this is the first end."""
        first, self._ended = not self._ended, True
        if first:
            self._metrics.count(REQUESTS_FINISHED, outcome, code)
            self._span.end(outcome, code)
        return first
