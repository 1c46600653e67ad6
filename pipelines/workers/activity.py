"""What a worker's main thread is doing, since when, and for which jobs: the other threads answer for it. No torch.

The pool asks by pings, which the reading thread answers whatever the main thread does, so a long step is told from a
process that has stopped. The jobs of the activity are also written to a file in memory that the pool shares: after a
death it names the jobs that were in the step that died, however suddenly the process went.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

from pipelines.engine.base import NO_STATISTICS, EngineStatistics

RECORD = 4096  # bytes of the file with the jobs' ids: one page, so that one write replaces it


class ActivityReport(NamedTuple):
    """What a pong says. `kind` is empty when there is nothing to do.

    `amount` is how much there is to do, in megapixels for what grows with the image. `pace` is the most seconds that
    one unit of a kind has taken so far. `statistics` are the engine's, as they were when the last stage ended.
    """

    kind: str
    amount: float
    seconds: float
    pace: dict[str, float]
    statistics: EngineStatistics = NO_STATISTICS

    @classmethod
    def parse(cls, header: Mapping[str, Any]) -> Self:
        """The report that a pong carries."""
        fields = {name: header[name] for name in cls._fields}
        return cls(**fields | {"statistics": EngineStatistics(*header["statistics"])})


IDLE = ActivityReport("", 0.0, 0.0, {})


class Activity:
    """Written by the main thread, read by any. `record` is the shared file's descriptor, -1 for none."""

    def __init__(self, record: int = -1) -> None:
        self._record = record
        self._lock = threading.Lock()
        self._current: tuple[str, float, float] | None = None  # kind, amount, beginning
        self._pace: dict[str, float] = {}
        self.statistics = NO_STATISTICS  # replaced as a whole, so that no lock is needed

    def begin(self, kind: str, amount: float = 1.0, jobs: Sequence[str] = ()) -> None:
        """Work of one kind begins; what was going on before is over."""
        if self._record >= 0:
            os.pwrite(self._record, " ".join(jobs).encode()[:RECORD].ljust(RECORD), 0)
        with self._lock:
            self._learn()
            self._current = kind, amount, time.monotonic()

    def end(self) -> None:
        """Nothing is going on. How long it took is a measure for the next time."""
        if self._record >= 0:
            os.pwrite(self._record, b" " * RECORD, 0)
        with self._lock:
            self._learn()
            self._current = None

    @contextmanager
    def doing(self, kind: str, amount: float, jobs: Sequence[str]) -> Iterator[None]:
        self.begin(kind, amount, jobs)
        try:
            yield
        except BaseException:  # the record stays: where the device is lost, the process ends next
            with self._lock:
                self._current = None
            raise
        self.end()

    def report(self) -> dict[str, Any]:
        """The fields of `ActivityReport`."""
        with self._lock:
            kind, amount, begun = self._current or ("", 0.0, time.monotonic())
            return ActivityReport(kind, amount, time.monotonic() - begun, dict(self._pace), self.statistics)._asdict()

    def _learn(self) -> None:
        if self._current is not None:
            kind, amount, begun = self._current
            self._pace[kind] = max(self._pace.get(kind, 0.0), (time.monotonic() - begun) / amount)


def read_record(record: int) -> frozenset[str]:
    """The ids of the jobs that a dead worker was working on."""
    return frozenset(os.pread(record, RECORD, 0).decode(errors="replace").replace("\0", " ").split())
