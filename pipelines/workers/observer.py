"""Whoever wants to count what happens in a pool. No torch."""

from pipelines.request import ImageRequest


class PoolObserver:
    """Hears of steps and of workers. Does nothing with it; its subclasses do, and must return at once."""

    def step_taken(self, request: ImageRequest, step: int, seconds: float, batch: int) -> None:
        """Step `step`, from 1, of an image was taken, in a forward pass of `seconds`.

        `batch` images shared the pass; it is 0 for all of them but one, so that each pass is counted once.
        """

    def worker_loaded(self, cause: str, seconds: float) -> None:
        """A worker is ready. `cause` of its start: `start`, `restart` (another one has died) or `wake`."""
