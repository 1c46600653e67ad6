"""What is not HTTP at all still gets our envelope: uvicorn's h11 protocol with its plain-text 400 replaced."""

import secrets

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.api.middleware import error_response
from server.errors import MalformedRequest


class EnvelopeProtocol(H11Protocol):
    """HTTP/1.1 whose refusals are JSON. The connection closes after one: what follows cannot be trusted."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own text is not for clients
        request_id = secrets.token_hex(16)
        reply = error_response(MalformedRequest(), request_id, "")
        headers = [*reply.raw_headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        events = (
            h11.Response(status_code=reply.status_code, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(reply.body)),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
