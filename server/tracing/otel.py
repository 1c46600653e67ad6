"""Traces by OpenTelemetry, sent by OTLP over HTTP as the OTEL_* variables say.

Only W3C Trace Context is read and sent on: baggage would go on to receivers that its sender does not know. Nothing
here is global, so a program around the app keeps its own providers. Attributes are OpenTelemetry's where it has them
(https://github.com/open-telemetry/semantic-conventions-genai, in development; HTTP's are stable).
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from pipelines.request import ImageRequest, ImageResult
from pipelines.trace_context import trace_context
from server.tracing.traces import NO_ROUTE, DeliverySpan, Ended, GenerationSpan, RequestSpan, Traces
from weights.version import read_version

NAME = "srpo"
PROTOCOL = "http/protobuf"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")  # others would be names that clients make up
UNTRACED = ("/health", "/ready", "/metrics")  # called every few seconds
STOP = 3.0  # seconds for what is left at the end, whatever the collector does: less than `server.cli.stopping.MARGIN`
SECOND = 10**9  # in nanoseconds
W3C = TraceContextTextMapPropagator()
log = structlog.get_logger("srpo")


def headers_of(span: Span) -> dict[str, str]:
    """What says elsewhere that its work belongs to this span."""
    headers: dict[str, str] = {}
    W3C.inject(headers, set_span_in_context(span))
    return headers


def end_span(span: Span, error: str) -> None:
    """`error`: what went wrong, by a word of few; empty if nothing did."""
    if error:
        span.set_attribute("error.type", error)
        span.set_status(StatusCode.ERROR)
    span.end()


class OtelRequest(RequestSpan):
    """`SERVER`: what the client waits for."""

    def __init__(self, span: Span, method: str) -> None:
        self._span = span
        self._method = method

    def end(self, ended: Ended) -> None:
        if ended.route != NO_ROUTE:
            self._span.update_name(f"{self._method} {ended.route}")
            self._span.set_attribute("http.route", ended.route)
        self._span.set_attribute("http.response.status_code", ended.status)
        if ended.code and ended.status < 500:  # the client's own fault is no failure of the server's
            self._span.set_attribute("error.type", ended.code)
        end_span(self._span, (ended.code or str(ended.status)) if ended.status >= 500 else "")


class OtelGeneration(GenerationSpan):
    """`INTERNAL`, since the model runs in this server."""

    def __init__(self, span: Span, tracer: Tracer) -> None:
        self._span = span
        self._tracer = tracer
        self._context = set_span_in_context(span)

    def enter(self) -> None:
        trace_context.set(headers_of(self._span))

    def add_stage(self, name: str, seconds: float) -> None:
        now = time.time_ns()
        self._add(name, now - int(seconds * SECOND), now)

    def add_device_stages(self, result: ImageResult) -> None:
        begun = time.time_ns() - int(result.timings.inference * SECOND)
        self._add("queue", begun - int(result.timings.queue * SECOND), begun)
        for name, start, end in result.stages:
            self._add(name, begun + int(start * SECOND), begun + int(end * SECOND))

    def end(self, outcome: str, code: str) -> None:
        self._span.set_attribute("srpo.outcome", outcome)
        if outcome == "cancelled":
            self._span.set_attribute("error.type", code)
        end_span(self._span, code if outcome == "failed" else "")

    def _add(self, name: str, start: int, end: int) -> None:
        self._tracer.start_span(name, self._context, start_time=start).end(end)


class OtelDelivery(DeliverySpan):
    """`CLIENT`: a receiver is called."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.headers = headers_of(span)

    def end(self, status: int | None) -> None:
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        delivered = status is not None and 200 <= status < 300
        end_span(self._span, "" if delivered else str(status or "no_reply"))


class OtelTraces(Traces):
    """Spans, sent in batches by a thread. Where the collector is away they are dropped, and the log says so."""

    def __init__(self) -> None:
        for name in PROTOCOLS:
            if os.environ.get(name, PROTOCOL) != PROTOCOL:
                raise ValueError(f"{name}={os.environ[name]}: traces are sent by {PROTOCOL} only")
        resource = Resource.create({"service.version": read_version()})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": NAME}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(NAME, read_version())

    def begin_request(self, scope: Scope) -> RequestSpan:
        if scope["path"] in UNTRACED:
            return RequestSpan()
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        headers = Headers(scope=scope)
        parent = W3C.extract({name: headers[name] for name in W3C.fields if name in headers})
        attributes = {"http.request.method": method, "url.scheme": scope.get("scheme", "http")}
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)
        trace_context.set(headers_of(span))
        return OtelRequest(span, method)

    def begin_generation(self, request: ImageRequest, named: str, trace: Mapping[str, str]) -> GenerationSpan:
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "generate_content",
            "gen_ai.provider.name": NAME,
            "gen_ai.request.model": named,
            "gen_ai.response.model": request.model,
            "gen_ai.output.type": "image",
            "gen_ai.request.choice.count": len(request.seeds),
            "gen_ai.request.seed": request.seeds[0],
            "srpo.image.width": request.width,
            "srpo.image.height": request.height,
            "srpo.steps": request.steps,
            "srpo.acceleration": request.acceleration,
        }
        name = f"generate_content {named}"
        span = self._tracer.start_span(name, W3C.extract(dict(trace)), SpanKind.INTERNAL, attributes)
        return OtelGeneration(span, self._tracer)

    def begin_delivery(self, host: str, attempt: int, trace: Mapping[str, str]) -> DeliverySpan:
        address, _, port = host.rpartition(":")
        attributes: dict[str, Any] = {"http.request.method": "POST", "server.address": address}
        attributes |= {"server.port": int(port), "http.request.resend_count": attempt - 1}
        return OtelDelivery(
            self._tracer.start_span("POST webhook", W3C.extract(dict(trace)), SpanKind.CLIENT, attributes)
        )

    def stop(self) -> None:
        """Send what is left, for `STOP` seconds at most.

        The exporter cannot be interrupted: a collector that accepts connections and does not answer holds it for its
        own timeout, batch by batch, and one that drips its answer for ever. So it is left behind in a thread that no
        end of the process waits for.
        """
        sending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        sending.start()
        sending.join(STOP)
        if sending.is_alive():
            log.warning("traces_unsent", seconds=STOP, advice="see whether OTEL_EXPORTER_OTLP_ENDPOINT takes them")
