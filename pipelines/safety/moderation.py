"""The operator's own moderation service, called over HTTP. Any reply without a clear verdict is a failure.

POST, application/json: `{"type": "image", "image": "data:image/png;base64,..."}` or
`{"type": "prompt", "prompt": "..."}`. Reply: 200 and `{"flagged": true}` or `{"flagged": false}`; other fields are
ignored. Redirects and proxies are not followed: pictures and prompts go to the configured address and nowhere else.
"""

import base64
import contextlib
import http.client
import io
import json
import socket
import time
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from pipelines.errors import SafetyUnavailable
from pipelines.trace_context import trace_context

MAX_REPLY = 2**16


class TimedSocket:
    """What `http.client` needs of a connected socket, with one deadline for all that is sent and read.

    A socket's own timeout begins anew with every byte, so a service that drips its answer would never end. `until` is
    on the monotonic clock; after it every call raises `TimeoutError`. Whoever made the socket closes it.
    """

    def __init__(self, sock: socket.socket, until: float) -> None:
        self._sock = sock
        self._until = until

    def sendall(self, data: bytes) -> None:
        self._renew_timeout()
        self._sock.sendall(data)

    def receive(self, buffer: Any) -> int:
        self._renew_timeout()
        return self._sock.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(TimedReader(self))

    def close(self) -> None:
        """Called by `http.client` when the reply may still have to be read."""

    def _renew_timeout(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)


class TimedReader(io.RawIOBase):
    """The reading half of a `TimedSocket`."""

    def __init__(self, sock: TimedSocket) -> None:
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._sock.receive(buffer)


class Hook:
    """One moderation endpoint. `user:password@` in the URL becomes basic authorization.

    A question ends within `seconds`, however slowly the service answers.
    """

    def __init__(self, url: str, seconds: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a moderation hook needs a URL that begins with http:// or https://")
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._seconds = seconds
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {"content-type": "application/json"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        self.name = f"hook ({parts.hostname})"

    def flags(self, question: dict[str, Any]) -> bool:
        """The service's verdict. Raises `SafetyUnavailable`. Blocks."""
        until = time.monotonic() + self._seconds
        connection: Any = self._connect(self._host, self._port, timeout=self._seconds)
        try:
            connection.connect()
            with contextlib.closing(connection.sock) as plain:
                connection.sock = TimedSocket(plain, until)
                connection.request("POST", self._path, json.dumps(question), {**self._headers, **trace_context.get()})
                reply = connection.getresponse()
                status, body = reply.status, reply.read(MAX_REPLY)
            flagged = json.loads(body)["flagged"] if status == 200 else None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SafetyUnavailable(f"{self.name}: {type(error).__name__}") from error
        if not isinstance(flagged, bool):
            raise SafetyUnavailable(f"{self.name}: status {status}, no verdict")
        return flagged


class ImageHook(Hook):
    """The moderation service as a checker: its verdict is a score of 1 or 0."""

    def score(self, picture: Image.Image) -> float:
        with io.BytesIO() as file:
            picture.save(file, "png", compress_level=1)
            data = base64.b64encode(file.getvalue()).decode()
        return float(self.flags({"type": "image", "image": f"data:image/png;base64,{data}"}))

    def self_test(self) -> None:
        """One plain grey picture: the service is there and answers."""
        self.score(Image.new("RGB", (64, 64), "grey"))


class PromptHook(Hook):
    """The moderation service for prompts."""

    def __call__(self, prompt: str) -> bool:
        return self.flags({"type": "prompt", "prompt": prompt})
