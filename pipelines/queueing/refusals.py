"""When a request that found the queue full should come back.

Advice that is too early costs a client one of its few retries, so it errs to the late side. Refused clients stand in a
line of promises: each is told a place's time later than the one before, or they would come back together for the one
place that is free then. Whether a refused client comes back at all is not known, so the line has a limit.
"""

import time
from collections.abc import Sequence

from pipelines.errors import QueueFull
from pipelines.job import Job

LATENESS = 1.1  # times the predicted seconds
SLACK = 0.5  # seconds, added to them
LINE = 60.0  # seconds that the line reaches ahead, which is as long as clients obey


class Refusals:
    """The promises made so far."""

    def __init__(self) -> None:
        self._promised = 0.0  # the latest of them, on the monotonic clock

    def error(self, ahead: float, running: Sequence[Job], waiting: int) -> QueueFull:
        """The error of a refused request, where `ahead` seconds of work are predicted."""
        ahead = max(ahead, 0.0, *(observed_left(job) for job in running))
        place = max(SLACK, ahead * LATENESS / max(1, len(running) + waiting))
        now = time.monotonic()
        first = now + ahead * LATENESS + SLACK
        self._promised = min(max(first, self._promised + place), max(first, now + LINE))
        return QueueFull(waiting, len(running), self._promised - now)


def observed_left(job: Job) -> float:
    """Seconds that a running job needs at its pace so far; 0 before its first step."""
    if job.dispatched is None or job.remaining_fraction >= 1:
        return 0.0
    return (time.monotonic() - job.dispatched) * job.remaining_fraction / (1 - job.remaining_fraction)
