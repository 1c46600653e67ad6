"""A connection before there is a request: uvicorn's h11 protocol, with what it lacks.

uvicorn gives a client all the time it wants to send a request's headers, or nothing at all, or a body that nobody
reads, and takes any number of connections. Here each of these has a deadline, and a connection beyond the limit takes
the place of the one that has been quiet for the longest; so whoever holds many connections open holds up nobody who has
something to ask. What is refused here is refused with our envelope, and the connection closes: what follows cannot be
trusted. A body that was cut into pieces of a byte or two is refused: h11 needs longer to read them than a client to
send them, and nobody else is answered meanwhile.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import HeaderTimeout, MalformedRequest, ServerError, TooManyConnections
from server.transport.middleware import error_response

WARN_EVERY = 60.0  # seconds
SHREDS = 2**12  # bytes that come at once: fewer are read in some milliseconds, whatever their pieces
PIECE = 2**16  # bytes that are read from a connection at a time, of asyncio's 2**18: others wait for less
MIN_PIECE = 16  # bytes of a chunk on average, its two line ends included
log = structlog.get_logger("srpo")


@dataclass(slots=True)
class ConnectionLimits:
    """What the connections of one server share: how many may be open, and the seconds that a client has.

    `headers` are those for a request's line and headers, `unread` those for a body whose request is answered already.
    `refused` hears of each connection that is refused, which is told `reply_headers`.
    """

    headers: float
    unread: float
    connections: int
    refused: Callable[[ServerError], None] = lambda _: None
    reply_headers: Mapping[str, str] = field(default_factory=dict)
    warned: float = float("-inf")

    def warn(self) -> None:
        """Say that the limit is reached, now and then: it may be reached a thousand times a second."""
        if (now := time.monotonic()) > self.warned + WARN_EVERY:
            self.warned = now
            log.warning("connections_full", limit=self.connections)


class EnvelopeProtocol(H11Protocol):
    """HTTP/1.1 with deadlines, a limit of connections, and refusals that are JSON."""

    limits: ConnectionLimits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quiet_since = time.monotonic()
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def quiet(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if hasattr(transport, "max_size"):
            transport.max_size = PIECE
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        if len(data) > SHREDS and data.count(b"\r\n") * MIN_PIECE > 2 * len(data) and self._is_chunked(data):
            self._refuse(MalformedRequest())
            return
        super().data_received(data)
        self._watch()

    def _is_chunked(self, data: bytes) -> bool:
        """Whether the request that `data` begins, or goes on with, has a body in chunks."""
        if self.conn.their_state is h11.SEND_BODY:
            return any(name == b"transfer-encoding" for name, _ in self.headers or ())
        return b"transfer-encoding" in data.lower()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.quiet_since = time.monotonic()
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._unwatch()  # uvicorn's own deadline for an idle connection runs
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own text is not for clients
        self._refuse(MalformedRequest())

    def _watch(self) -> None:
        """Let the deadline run while the client still has to send headers, or a body whose request is answered."""
        ours, theirs = self.conn.our_state, self.conn.their_state
        if self.transport.is_closing() or not (theirs is h11.IDLE or (ours is h11.DONE and theirs is h11.SEND_BODY)):
            self._unwatch()
        elif self._deadline is None:
            seconds = self.limits.headers if theirs is h11.IDLE else self.limits.unread
            self._deadline = self.loop.call_later(seconds, self._end)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self) -> None:
        """The deadline has passed. Who has sent nothing hears nothing: a client may keep connections in reserve."""
        self._deadline = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(HeaderTimeout(self.limits.headers))
        else:
            self.transport.close()

    def _make_room(self) -> None:
        """Close the connection that has been quiet for the longest; if each is being answered, this one."""
        self.limits.warn()
        others: set[EnvelopeProtocol] = self.connections - {self}  # type: ignore[assignment]
        quiet = [other for other in others if other.quiet and not other.transport.is_closing()]
        if quiet:
            min(quiet, key=lambda other: other.quiet_since).transport.close()
        else:
            self._refuse(TooManyConnections())

    def _refuse(self, error: ServerError) -> None:
        """Answer with the envelope, unless an answer has begun, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        self.limits.refused(error)
        request_id = secrets.token_hex(16)
        reply = error_response(error, request_id, "")
        ids = {"x-request-id": request_id, "x-inference-id": secrets.token_hex(16)}
        reply.headers.update({**ids, "connection": "close", **self.limits.reply_headers})
        reason = HTTPStatus(reply.status_code).phrase.encode()
        events = (
            h11.Response(status_code=reply.status_code, headers=reply.raw_headers, reason=reason),
            h11.Data(data=bytes(reply.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def limited_protocol(limits: ConnectionLimits) -> type[EnvelopeProtocol]:
    """The protocol for the connections of one server; uvicorn makes one of them for each."""
    return type("LimitedProtocol", (EnvelopeProtocol,), {"limits": limits})
