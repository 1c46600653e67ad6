"""How long work on files tells a caller how far it is: a bar for each stage, counted in bytes."""

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], None]  # bytes since the last call; negative when some must be read again


class ProgressReporter(Protocol):
    """Shows the progress of a pull or a conversion."""

    def start(self, description: str, size: int) -> Advance:
        """Begin a bar of `size` bytes and return the function that advances it."""
        ...
