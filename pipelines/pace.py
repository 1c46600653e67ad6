"""How fast this device has been so far: turns work ahead into seconds for `retry-after` and `eta`."""

FIRST_GUESS = 0.1  # seconds a megapixel-step, before anything was measured: between an H200 and a laptop
FIRST_LOAD = 5.0  # seconds, until loading has come far enough to tell
TELLING = 0.1  # of the loading
WEIGHT = 0.2  # of the newest measurement


class Pace:
    """Exponential averages of measured seconds."""

    def __init__(self) -> None:
        self._per_cost: float | None = None
        self._load_seconds = FIRST_LOAD

    def drawn(self, cost: float, seconds: dict[str, float]) -> None:
        """A job of `cost` megapixel-steps kept the device busy for the sum of its stages."""
        busy = seconds["text"] + seconds["denoise"] + seconds["decode"]
        measured = busy / cost
        self._per_cost = measured if self._per_cost is None else (1 - WEIGHT) * self._per_cost + WEIGHT * measured

    def loaded(self, seconds: float) -> None:
        self._load_seconds = seconds

    def load_left(self, elapsed: float, progress: float) -> float:
        """Predicted seconds until the engine is loaded, at least 1; `progress` is from 0 to 1."""
        total = elapsed / progress if progress >= TELLING else self._load_seconds
        return max(1.0, total - elapsed)

    def seconds(self, cost: float) -> float:
        """Predicted device seconds for `cost` megapixel-steps."""
        return cost * (FIRST_GUESS if self._per_cost is None else self._per_cost)
