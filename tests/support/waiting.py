"""Waiting for what a running server will do."""

import time
from collections.abc import Callable

LIMIT = 120.0  # seconds; only what fails takes so long, and a loaded machine may need a part of it


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether it comes true. It is asked once more after the time, since this process may be what is late."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
