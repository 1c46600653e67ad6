"""The state of the server's parts, read when Prometheus asks for it: no bookkeeping that could go wrong."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from pipelines.loading.cards import DriverUnavailable, list_cards
from pipelines.workers.pool import WorkerPool
from pipelines.workers.status import POOL_STATES, WORKER_STATES
from server.images.stores.base import Store
from server.metrics.table import (
    CACHE_HITS,
    CACHE_MISSES,
    CAPACITY,
    CARD_FREE,
    CARD_SIZE,
    DEVICE_MEMORY,
    DISK_FREE,
    DISK_SIZE,
    ENGINE_INFO,
    HEARTBEAT_AGE,
    POOL_STATE,
    QUEUE_SECONDS,
    RUNNING,
    STATE,
    STORE_BYTES,
    STORE_CAP,
    WAITING,
    WORKER_MEMORY,
    WORKER_RESTARTS,
    WORKER_STATE,
    Metric,
)

STATM_RESIDENT = 1  # the second field of /proc/PID/statm, in pages
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


class Reading(NamedTuple):
    """A value of one of `STATE`, and the values of its labels."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


class Exposition(Collector):
    """What one scrape shows: what was counted, and what was read for it."""

    def __init__(self, counted: CollectorRegistry, readings: Iterable[Reading]) -> None:
        self._counted = counted
        self._readings = list(readings)

    def collect(self) -> Iterator[Family]:
        yield from self._counted.collect()
        for metric in STATE:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=metric.labels)
            for reading in self._readings:
                if reading.metric is metric:
                    family.add_metric(reading.labels, reading.value)
            yield family


def read_pool(pool: WorkerPool) -> Iterator[Reading]:
    """The queue, the engine and the workers."""
    status = pool.status()
    yield Reading(RUNNING, status.running)
    yield Reading(WAITING, status.waiting)
    yield Reading(CAPACITY, pool.capacity)
    yield Reading(QUEUE_SECONDS, pool.estimate_wait())
    for state in POOL_STATES:
        yield Reading(POOL_STATE, state == status.state, (state,))
    if (info := status.info) is not None:
        labels = (info.model, info.device, info.dtype, info.placement, info.optimizations, info.fingerprint)
        yield Reading(ENGINE_INFO, 1, labels)
    for number, supervisor in enumerate(pool.supervisors):
        name, worker = (str(number),), supervisor.status()
        yield Reading(WORKER_RESTARTS, worker.restarts, name)
        yield Reading(HEARTBEAT_AGE, supervisor.silence, name)
        for worker_state in WORKER_STATES:
            yield Reading(WORKER_STATE, worker_state == worker.state, (*name, worker.device, worker_state))
        if worker.pid is not None and (resident := read_resident(worker.pid)) is not None:
            yield Reading(WORKER_MEMORY, resident, name)
        statistics = supervisor.report.statistics
        for kind, count in statistics.memory.items():
            yield Reading(DEVICE_MEMORY, count, (*name, kind))
        for cache, (hits, misses) in statistics.caches.items():
            yield Reading(CACHE_HITS, hits, (*name, cache))
            yield Reading(CACHE_MISSES, misses, (*name, cache))


def read_resident(pid: int) -> int | None:
    """Bytes of a process's resident memory; None where the system does not tell, or no longer."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[STATM_RESIDENT]) * PAGE
    except (OSError, IndexError, ValueError):
        return None


def read_store(store: Store) -> Iterator[Reading]:
    yield Reading(STORE_BYTES, store.size)
    yield Reading(STORE_CAP, store.cap)


def read_disk(folder: Path) -> Iterator[Reading]:
    """May take long: the folder can be on a network. Nothing where it cannot be read."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return
    yield Reading(DISK_SIZE, usage.total)
    yield Reading(DISK_FREE, usage.free)


class CardReader:
    """Asks the NVIDIA driver; where there is none, only once."""

    def __init__(self) -> None:
        self._present = True

    def read(self) -> Iterator[Reading]:
        """May take long."""
        try:
            cards = list_cards() if self._present else []
        except DriverUnavailable:
            self._present = False
            return
        for number, card in enumerate(cards):
            yield Reading(CARD_SIZE, card.total, (str(number),))
            yield Reading(CARD_FREE, card.free, (str(number),))
