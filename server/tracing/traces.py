"""What the server tells of its work to a trace. These do nothing with it; `OtelTraces` makes spans of it.

A request is a span, in the trace that its client names; the generation below it is another one, whose stages are
spans; and so is each attempt to reach a webhook. No prompt, no key, no path and no query is told.
"""

from collections.abc import Mapping
from typing import NamedTuple

from starlette.types import Scope

from pipelines.request import ImageRequest, ImageResult

NO_ROUTE = "none"  # of a request that matches none


class Ended(NamedTuple):
    """How a request was answered: by route template, status and `error.code` (empty: no error)."""

    route: str
    status: int
    code: str


class RequestSpan:
    """A request of a client, from its headers to the end of its reply."""

    def end(self, ended: Ended) -> None: ...


class GenerationSpan:
    """An admitted request for images, from its place in the line to its last stored image.

    Its stages are told when they have just ended.
    """

    def enter(self) -> None:
        """What the current task calls from now on belongs to this span."""

    def add_stage(self, name: str, seconds: float) -> None: ...

    def add_device_stages(self, result: ImageResult) -> None:
        """The wait in the queue, and what the device did, until now."""

    def end(self, outcome: str, code: str) -> None:
        """`outcome` as in the metrics; `code`: the `error.code` of what went wrong, or empty."""


class DeliverySpan:
    """An attempt to tell a receiver of a job's end. `headers` go with it."""

    headers: Mapping[str, str] = {}

    def end(self, status: int | None) -> None:
        """`status`: the receiver's; None if there was no reply."""


class Traces:
    """Where traces begin. May be called from the event loop's thread only."""

    def begin_request(self, scope: Scope) -> RequestSpan:  # noqa: ARG002 - nothing is recorded
        """The current task, and what it starts, belong to the request from now on (`trace_context`)."""
        return RequestSpan()

    def begin_generation(self, request: ImageRequest, named: str, trace: Mapping[str, str]) -> GenerationSpan:  # noqa: ARG002
        """`named`: the model as the client called it; `trace`: what the generation belongs to, as headers."""
        return GenerationSpan()

    def begin_delivery(self, host: str, attempt: int, trace: Mapping[str, str]) -> DeliverySpan:  # noqa: ARG002
        """`attempt` counts from 1; `trace` as in `begin_generation`."""
        return DeliverySpan()

    def stop(self) -> None:
        """Send what is left. Blocks for at most about three seconds, where it cannot be sent."""
