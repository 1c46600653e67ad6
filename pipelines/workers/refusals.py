"""When a request that found the queue full should come back.

Advice that is too early costs a client one of its few retries, so it errs to the late side; and two clients that were
refused together are told different times, or they would come back together for the one place that is free then.
"""

import time
from collections.abc import Sequence
from itertools import cycle

from pipelines.errors import QueueFull
from pipelines.job import Job

LATENESS = 1.1  # times the predicted seconds
SLACK = 0.5  # seconds, added to them
TURNS = 8  # refused requests in a row that get times of their own


class Refusals:
    """The advice given so far."""

    def __init__(self) -> None:
        self._turns = cycle(range(TURNS))

    def error(self, ahead: float, running: Sequence[Job], waiting: int) -> QueueFull:
        """The error of a refused request, where `ahead` seconds of work are predicted: each a place later."""
        ahead = max(ahead, 0.0, *(observed_left(job) for job in running))
        place = max(SLACK, ahead / max(1, len(running) + waiting))
        return QueueFull(waiting, len(running), ahead * LATENESS + SLACK + next(self._turns) * place)


def observed_left(job: Job) -> float:
    """Seconds that a running job needs at its pace so far; 0 before its first step."""
    if job.dispatched is None or job.remaining_fraction >= 1:
        return 0.0
    return (time.monotonic() - job.dispatched) * job.remaining_fraction / (1 - job.remaining_fraction)
