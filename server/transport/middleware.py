"""The outermost layer: ids, host and origin checks, the error envelope, the access log.

Every failure inside becomes one envelope here, and only here.
"""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.errors import Draining
from server.envelope import envelope, headers_of
from server.error_table import UNEXPECTED, row_of
from server.errors import NotFound
from server.metrics.recorder import Metrics
from server.security.origins import OriginPolicy
from server.tracing.traces import Traces
from server.transport.turns import Turns

CLIENT_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
PROBES = ("/health", "/ready", "/metrics")  # called every few seconds: logged at debug level only
log = structlog.get_logger("srpo")


def error_response(error: Exception, request_id: str, path: str) -> Response:
    body = json.dumps(envelope(error, request_id, path)).encode()
    return Response(body, row_of(error).status, headers_of(error), "application/json")


class RequestMiddleware:
    """ASGI middleware. `scope["state"]` gets `request_id` and `inference_id`; `headers` go out with every reply."""

    def __init__(
        self, app: ASGIApp, origins: OriginPolicy, headers: Mapping[str, str], metrics: Metrics, traces: Traces
    ) -> None:
        self._app = app
        self._origins = origins
        self._metrics = metrics
        self._traces = traces
        self._headers = headers
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "//" in scope["path"]:  # a base URL with a slash at its end, in some clients
            scope = {**scope, "path": re.sub("/{2,}", "/", scope["path"])}
        if scope["path"] not in PROBES:
            await self._turns.take()
        context = RequestContext(scope, send, self._origins, self._headers)
        span = self._traces.begin_request(scope)
        try:
            self._origins.check_request(scope, context.headers)
            if "\0" in scope["path"] or b"%00" in scope["query_string"]:  # Postgres keeps no such text
                raise NotFound
            if scope["method"] == "OPTIONS":
                await Response(status_code=204)(scope, receive, context.send)
            else:
                await self._app(scope, receive, context.send)
        except asyncio.CancelledError:  # the shutdown's grace is over
            await context.fail(Draining(), receive)
            raise
        except Exception as error:  # noqa: BLE001 - the edge: whatever went wrong, the client gets the envelope
            await context.fail(error, receive)
        finally:
            span.end(self._metrics.count_reply(scope, context.status, context.error))
            context.log()


class RequestContext:
    """One request: its ids, the headers of its reply, and its line in the log."""

    def __init__(self, scope: Scope, send: Send, origins: OriginPolicy, extra: Mapping[str, str]) -> None:
        self._scope = scope
        self._send = send
        self._origins = origins
        self._extra = extra
        self._start = time.monotonic()
        self.status: int | None = None
        self.error: Exception | None = None
        self.headers = Headers(scope=scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        self.request_id = state["request_id"] = secrets.token_hex(16)
        self._inference_id = secrets.token_hex(16)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            reply = MutableHeaders(scope=message)
            reply.update(self._extra)
            reply["x-request-id"] = self.request_id
            reply["x-inference-id"] = self._inference_id
            client_id = self.headers.get("x-client-request-id", "")
            if CLIENT_ID.fullmatch(client_id):
                reply["x-client-request-id"] = client_id
            reply["x-content-type-options"] = "nosniff"
            if "transfer-encoding" in self.headers and "content-length" in self.headers:
                reply["connection"] = "close"  # a proxy may have read another length: RFC 9112, 6.1
            self._origins.cors(self._scope, self.headers, reply)
        await self._send(message)

    async def fail(self, error: Exception, receive: Receive) -> None:
        """Answer with the envelope, unless the reply has begun."""
        self.error = error
        if self.status is None:
            await error_response(error, self.request_id, self._scope["path"])(self._scope, receive, self.send)

    def log(self) -> None:
        facts: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status,
            "ms": round((time.monotonic() - self._start) * 1000, 1),
        }
        error, self.error = self.error, None  # its traceback holds this object, and the body with it
        if error is None and self._scope["path"] in PROBES:
            log.debug("request", **facts)
        elif error is None:
            log.info("request", **facts)
        elif row_of(error) is UNEXPECTED:
            log.error("request", error=type(error).__name__, exc_info=error, **facts)
        else:
            log.warning("request", error=type(error).__name__, **facts)
