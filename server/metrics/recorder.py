"""Counts what happens. One `Metrics` an app, with a registry of its own: two apps in one process share nothing."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from starlette.types import Scope

from pipelines.acceleration import PRESETS
from pipelines.request import ImageRequest
from pipelines.workers.observer import PoolObserver
from server.error_table import TABLE, row_of
from server.metrics.table import (
    BATCH_SIZE,
    EVENTS,
    HTTP_REQUESTS,
    IMAGES_CHECKED,
    REQUESTS_FINISHED,
    REQUESTS_REFUSED,
    STEP_LATENCY,
    STEPS,
    WORKER_LOADS,
    Metric,
    size_class,
)
from server.tracing.traces import NO_ROUTE, Ended

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")  # others would be labels that clients make up
FLAGGED: Mapping[bool, str] = {True: "true", False: "false"}
STEP_KINDS: Mapping[bool, str] = {True: "computed", False: "skipped"}


def describe_end(scope: Scope, status: int | None, error: Exception | None) -> Ended:
    """How a request was answered, in words of few."""
    code = (row_of(error).code or "invalid_request") if error is not None else ""
    return Ended(getattr(scope.get("route"), "path", NO_ROUTE), status or 499, code)


class Metrics(PoolObserver):
    """The metrics of `EVENTS`, and those of this process that every Prometheus client has (`process_...`).

    May be called from any thread. A label's value must be one of few.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._families = {metric.name: self._register(metric) for metric in EVENTS}
        ProcessCollector(registry=self.registry)
        for flagged in FLAGGED.values():
            self.count(IMAGES_CHECKED, flagged, by=0)
        for row in TABLE.values():  # a counter that begins at 1 has no increase that an alert could see
            if row.refuses:
                self.count(REQUESTS_REFUSED, row.code or "", by=0)
            elif row.status >= 500:
                self.count(REQUESTS_FINISHED, "failed", row.code or "", by=0)

    def count(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        self._child(metric, labels).inc(by)

    def observe(self, metric: Metric, value: float, *labels: str) -> None:
        self._child(metric, labels).observe(value)

    def count_reply(self, scope: Scope, status: int | None, error: Exception | None) -> Ended:
        """An HTTP request is over, and how. Without a `status` nobody was there any more to be answered."""
        ended = describe_end(scope, status, error)
        method = scope["method"] if scope["method"] in METHODS else "other"
        self.count(HTTP_REQUESTS, ended.route, method, str(ended.status), ended.code)
        if error is not None and row_of(error).refuses:
            self.count(REQUESTS_REFUSED, ended.code)
        return ended

    def count_connection(self, error: Exception) -> None:
        """A connection was refused before there was a request."""
        self.count_reply({"method": ""}, row_of(error).status, error)

    def step_taken(self, request: ImageRequest, step: int, seconds: float, batch: int) -> None:
        kind = STEP_KINDS[PRESETS[request.acceleration](request.steps)[step - 1]]
        self.count(STEPS, request.acceleration, kind)
        if batch:
            self.observe(STEP_LATENCY, seconds, size_class(request.pixels), request.acceleration, kind)
            self.observe(BATCH_SIZE, batch)

    def worker_loaded(self, cause: str, seconds: float) -> None:
        self.observe(WORKER_LOADS, seconds, cause)

    def _register(self, metric: Metric) -> Counter | Histogram:
        if metric.kind == "histogram":
            return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)
        return Counter(metric.name, metric.help, metric.labels, registry=self.registry)

    def _child(self, metric: Metric, labels: tuple[str, ...]) -> Any:
        family = self._families[metric.name]
        return family.labels(*labels) if labels else family
