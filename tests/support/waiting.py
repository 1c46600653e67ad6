"""Waiting for what a running server will do."""

import time
from collections.abc import Callable

LIMIT = 30.0  # seconds


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False
