"""A collector of traces on a loopback port: OTLP over HTTP, decoded by OpenTelemetry's own protocol."""

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from support.server import START_LIMIT
from support.waiting import within

KINDS = {Span.SPAN_KIND_INTERNAL: "internal", Span.SPAN_KIND_SERVER: "server", Span.SPAN_KIND_CLIENT: "client"}


@dataclass(frozen=True)
class Received:
    """A span as a collector sees it. `start` and `end` are Unix nanoseconds."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]
    service: str


def value_of(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


class Collector:
    """`raw` is what came, byte for byte, decompressed. Answers with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.raw: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers["content-encoding"] == "gzip":
                    body = gzip.decompress(body)
                outer.raw.append(self.path.encode() + b"\n" + body)
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def spans(self, trace: str) -> list[Received]:
        """Those of one trace, in the order of their starts."""
        found = []
        for message in list(self.raw):
            path, _, body = message.partition(b"\n")
            assert path == b"/v1/traces", path
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {pair.key: value_of(pair.value) for pair in resource.resource.attributes}
                found += [received(span, named) for scope in resource.scope_spans for span in scope.spans]
        return sorted((span for span in found if span.trace == trace), key=lambda span: (span.start, span.end))

    def wait_for(self, trace: str, *names: str) -> list[Received]:
        """The spans of a trace, as soon as those with these names are there."""
        assert within(START_LIMIT, lambda: set(names) <= {span.name for span in self.spans(trace)}), self.spans(trace)
        return self.spans(trace)


def received(span: Span, resource: dict[str, Any]) -> Received:
    return Received(
        span.name,
        KINDS[span.kind],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == Status.STATUS_CODE_ERROR,
        {pair.key: value_of(pair.value) for pair in span.attributes},
        resource["service.name"],
    )
