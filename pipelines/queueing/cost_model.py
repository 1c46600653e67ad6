"""Predicts how many seconds of device time a request takes, from what was measured on this device.

The predictions give the order of work, `retry-after` and `eta`. Attention makes a megapixel of a large image cost more
than one of a small image, so every size has its own average.
"""

from math import log

from pipelines.request import ImageRequest, Timings

DEFAULT_RATE = 0.1  # seconds for a megapixel-step before anything was measured: between an H200 and a laptop
DEFAULT_LOAD_SECONDS = 5.0  # used until loading has come as far as MIN_PROGRESS
MIN_PROGRESS = 0.1  # the part of the loading from which its speed is extrapolated
OVERDUE = 0.25  # of the seconds so far: loading is predicted to take at least so much longer
SMOOTHING = 0.2  # weight of the newest measurement


class CostModel:
    """Exponential averages of measured seconds."""

    def __init__(self) -> None:
        self._per_cost: dict[int, float] = {}  # pixels of an image -> seconds a megapixel-step
        self._load_seconds = DEFAULT_LOAD_SECONDS

    def record_job(self, request: ImageRequest, timings: Timings) -> None:
        """Learn from a finished job: it kept the device busy for the sum of its stages."""
        measured = timings.device / request.cost
        before = self._per_cost.get(request.pixels, measured)
        self._per_cost[request.pixels] = (1 - SMOOTHING) * before + SMOOTHING * measured

    def estimate_seconds(self, request: ImageRequest, remaining_fraction: float = 1.0) -> float:
        """Predicted device seconds for a part of a request, from the measured size nearest to the request's."""
        if not self._per_cost:
            return DEFAULT_RATE * request.cost * remaining_fraction
        nearest = request.pixels
        if nearest not in self._per_cost:
            nearest = min(self._per_cost, key=lambda pixels: abs(log(pixels / request.pixels)))
        return self._per_cost[nearest] * request.cost * remaining_fraction

    def record_load(self, seconds: float) -> None:
        self._load_seconds = seconds

    def estimate_load_seconds(self, elapsed: float, progress: float) -> float:
        """Predicted seconds until the engine is loaded, at least 1; `progress` is from 0 to 1.

        Loading that takes longer than predicted makes the prediction grow: what has taken long may take as long again.
        """
        total = elapsed / progress if progress >= MIN_PROGRESS else self._load_seconds
        return max(1.0, total - elapsed, elapsed * max(OVERDUE, 1 - progress))
