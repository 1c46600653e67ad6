"""What is counted of one admitted request: how it ended, what its stages took, which images it made."""

import asyncio
import time

from pipelines.errors import Cancelled, ContentWithheld
from pipelines.request import ImageRequest
from pipelines.safety.guard import InspectedResult
from server.envelope import row_of
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
from server.usage.ledger import UsageEntry

KEY = "key_"  # what the ids of the database's keys begin with


def label_of(owner: str) -> str:
    """A key's id. Keys of the settings have one label together: a hash says something of a key that is short."""
    return owner if owner.startswith(KEY) else "settings" if owner else "none"


class GenerationMeter:
    """Begins with the admission. Of several ends only the first counts."""

    def __init__(self, metrics: Metrics, request: ImageRequest) -> None:
        self._metrics = metrics
        self._request = request
        self._admitted = time.monotonic()
        self._ended = False
        metrics.count(REQUESTS_ADMITTED)

    def stage(self, name: str, seconds: float) -> None:
        self._metrics.observe(STAGE_SECONDS, seconds, name)

    def succeed(self, inspected: InspectedResult, usage: UsageEntry) -> None:
        """The reply is complete."""
        if not self._end("succeeded", ""):
            return
        timings, request = inspected.result.timings, self._request
        self._metrics.observe(QUEUE_WAIT, timings.queue)
        for name, seconds in (("text", timings.text), ("denoise", timings.denoise), ("decode", timings.decode)):
            self.stage(name, seconds)
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
        return first
