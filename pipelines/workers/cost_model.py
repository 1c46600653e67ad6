"""How fast this device has been so far: turns a request into predicted seconds, for the order of work, `retry-after`
and `eta`. Attention makes a megapixel of a large image dearer than one of a small image, so every size has its own.
"""

from math import log

from pipelines.request import ImageRequest

FIRST_GUESS = 0.1  # seconds a megapixel-step, before anything was measured: between an H200 and a laptop
FIRST_LOAD = 5.0  # seconds, until loading has come far enough to tell
TELLING = 0.1  # of the loading
WEIGHT = 0.2  # of the newest measurement


class CostModel:
    """Exponential averages of measured seconds."""

    def __init__(self) -> None:
        self._per_cost: dict[int, float] = {}  # pixels of an image -> seconds a megapixel-step
        self._load_seconds = FIRST_LOAD

    def drawn(self, request: ImageRequest, seconds: dict[str, float]) -> None:
        """A job kept the device busy for the sum of its stages."""
        measured = (seconds["text"] + seconds["denoise"] + seconds["decode"]) / request.cost
        before = self._per_cost.get(request.pixels, measured)
        self._per_cost[request.pixels] = (1 - WEIGHT) * before + WEIGHT * measured

    def seconds(self, request: ImageRequest, left: float = 1.0) -> float:
        """Predicted device seconds for the part `left` of a request, by the measured size that is nearest to its."""
        if not self._per_cost:
            return FIRST_GUESS * request.cost * left
        nearest = min(self._per_cost, key=lambda pixels: abs(log(pixels / request.pixels)))
        return self._per_cost[nearest] * request.cost * left

    def loaded(self, seconds: float) -> None:
        self._load_seconds = seconds

    def load_left(self, elapsed: float, progress: float) -> float:
        """Predicted seconds until the engine is loaded, at least 1; `progress` is from 0 to 1."""
        total = elapsed / progress if progress >= TELLING else self._load_seconds
        return max(1.0, total - elapsed)
