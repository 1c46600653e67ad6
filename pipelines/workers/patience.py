"""How long a worker may be silent or busy, and when a dead one is followed by the next. No torch.

Two signs are watched. A worker is *alive* while its reading thread answers pings; that shows nothing of its work. One
that cannot answer and still computes or waits for a disk is not taken for dead so soon: libraries that are read from a
cold disk hold Python's lock for seconds, and on a machine with too much to do everything takes longer. It
*gets on* while each activity ends within its budget: the larger of a floor and `FACTOR` times what the same work took
before, on this device, since a step of 12B parameters on a CPU is no hang. What was never measured here gets `FACTOR`
floors. Each stage of loading is such an activity, and begins anew with every fraction that it reports.

Deaths are followed by a new worker at once, then with growing pauses. After `max_deaths` within `window` seconds, and
no finished job between, the circuit opens: the pool takes no work, and a worker is tried only every `retry` seconds,
until one is ready.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from pipelines.workers.activity import IDLE, ActivityReport

FACTOR = 10.0  # times the slowest pace, the floor where nothing was measured, the silence of a worker that works
MAX_BACKOFF = 30.0  # seconds between restarts of a worker that will not come up
PINGS = 5  # in each time for which a worker may be silent
MAX_PING_INTERVAL = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class Patience:
    """All times are in seconds. `silence`: without an answer; `floor`: the least that an activity may take."""

    silence: float = 30.0
    floor: float = 120.0
    max_deaths: int = 6
    window: float = 600.0
    retry: float = 60.0

    @property
    def interval(self) -> float:
        """Between two pings."""
        return min(MAX_PING_INTERVAL, self.silence / PINGS)

    def budget(self, report: ActivityReport, pace: dict[str, float]) -> float:
        """How long the reported activity may take; `pace` has the seconds of one unit of each kind."""
        if report.kind not in pace:
            return self.floor * FACTOR * max(1.0, report.amount)
        return max(self.floor, FACTOR * pace[report.kind] * report.amount)


@dataclass(slots=True)
class Heartbeat:
    """What is known of one worker process. Time counts only while this process runs, too: a pause is no silence."""

    silent: float = 0.0
    report: ActivityReport = IDLE
    pinged: float = field(default_factory=time.monotonic)

    def hear(self) -> None:
        self.silent = 0.0

    def tick(self, interval: float, works: bool = False) -> None:
        """Time passes: as much as went by, but no more than two intervals, in case our own loop was held up.

        `works`: the worker has used a processor or a disk meanwhile, so that a fraction of the time counts.
        """
        now = time.monotonic()
        self.silent += min(now - self.pinged, 2 * interval) / (FACTOR if works else 1.0)
        self.pinged = now


class Restarts:
    """The recent deaths of one device's workers."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._deaths: deque[float] = deque(maxlen=patience.max_deaths)
        self._backoff = 0.0
        self._next = 0.0

    @property
    def open(self) -> bool:
        """Whether so many died that no work should be taken until one is ready again."""
        deaths = self._deaths
        return len(deaths) == self._patience.max_deaths and time.monotonic() - deaths[0] < self._patience.window

    @property
    def seconds_left(self) -> float:
        """Until the next worker is started."""
        return max(0.0, self._next - time.monotonic())

    def count_death(self) -> float:
        """Returns the seconds after which the next worker is to be started."""
        self._deaths.append(time.monotonic())
        delay = self._patience.retry if self.open else self._backoff
        self._backoff = min(MAX_BACKOFF, self._backoff * 2 + 1)
        self._next = time.monotonic() + delay
        return delay

    def forgive(self) -> None:
        """A job has finished: the worker works."""
        self._deaths.clear()
        self._backoff = 0.0
