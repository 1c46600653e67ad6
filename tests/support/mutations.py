"""Requests drawn at random, right, nearly right and wrong: fields, bodies, whole requests, paths and headers."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from PIL import Image
from support.pictures import file_of

GENERATIONS = "/v1/images/generations"
FIELDS = (
    "model", "prompt", "image_size", "num_inference_steps", "guidance_scale", "num_images", "seed", "sync_mode",
    "enable_safety_checker", "output_format", "acceleration", "n", "size", "response_format", "quality", "style",
    "user", "background", "moderation", "output_compression", "stream", "partial_images", "extra_body", "image_url",
    "strength", "width", "height", "steps", "guidance", "cfg", "unknown", "", "\0", "é\r\n",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 4, 5, 28, 50, 51, 512, 544, 1536, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    10**100, -(10**300), 1.5, -0.0, 5e-324, 1e308, 20.000001, float("nan"), float("inf"), float("-inf"), "", "\0",
    "\ud800", "a\udfff", "\u202eabc", "\U0001f600" * 1000, "\r\nx: y", "\x1b[31m", "28", "true", "auto", "256x256",
    "1024x768", "1000x1000", "99999x1", "square", "square_hd", "b64_json", "url", "webp", "png", "jpeg", "high", "none",
    "flux/srpo", "flux/srpo/image-to-image", "tiny", "data:image/png;base64,AAAA", "http://127.0.0.1/", "file:///etc",
    [], {}, [[]], [None], {"width": 512}, {"width": 544, "height": 1568}, {"": None}, {"a": {"b": [1, "\ud800"]}},
)  # fmt: skip
PATHS = (
    "/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/v1/models", "/models", "/v1/models/flux/srpo",
    GENERATIONS, "/images/generations", "/v1/images/edits", "/v1/jobs", "/v1/jobs/abc", "/v1/jobs/abc/events",
    "/v1/webhooks/secret", "/v1/admin/keys", "/v1/admin/usage", "/v1/admin/sleep", "/files/abc.png",
    "/playground/app.js",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "FOO")
HEADERS = (
    "prefer", "idempotency-key", "x-client-request-id", "x-stainless-retry-count", "authorization", "range", "origin",
    "if-none-match", "if-range", "accept", "content-type", "content-encoding", "transfer-encoding", "expect", "host",
    "x-forwarded-for", "x-forwarded-proto", "traceparent", "webhook-url", "last-event-id", "user-agent", "cookie", "te",
    "upgrade", "connection", "access-control-request-headers",
)  # fmt: skip
HEADER_VALUES = (
    "", "respond-async", "a" * 300, "Bearer secret-key", "Bearer \xff\xfe", "bytes=0-0", "bytes=0-0,2-3", "bytes=-0",
    "bytes=--1", "bytes=" + "0-0," * 500, "application/json", "multipart/form-data; boundary=b", "multipart/form-data",
    "multipart/form-data; boundary=b; charset=punycode",
    "text/plain; charset=\xff", "gzip", "chunked", "100-continue", "127.0.0.1", "evil.example", "http://evil.example",
    "\x0b", "*", "W/\"x\"", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "-1", "99999999999999999999", "http://[::1]/",
)  # fmt: skip
PIECES = (b"\r\n", b"\0", b"\xff", b'"', b"\\u0000", b"1e999", b"[" * 500)


@dataclass(frozen=True)
class Request:
    raw: bytes
    framed: bool  # whether a server knows where it ends, so that there must be a reply


class Mutations:
    """A source of requests; the same `seed` gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._picture = file_of(Image.effect_noise((64, 64), 60))

    def draw(self, kind: str) -> Request:
        return KINDS[kind](self)

    def fields(self) -> Request:
        """A body of JSON in which some fields have any value."""
        return Request(self._post(GENERATIONS, "application/json", self._body()), framed=True)

    def body(self) -> Request:
        """A body of JSON of which some bytes are others."""
        return Request(self._post(GENERATIONS, "application/json", self._damaged(self._body())), framed=True)

    def form(self) -> Request:
        """A form with a picture, of which some bytes are others."""
        parts = []
        for name in self._chance.sample(["prompt", "model", "n", "size", "mask", "stream", "strength"], 3):
            value = str(self._chance.choice(VALUES)).encode("utf-8", "replace")
            parts.append(b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value))
        picture = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n'
        whole = b"".join([*parts, picture % self._picture, b"--b--\r\n"])
        if self._chance.random() < 0.8:
            whole = self._damaged(whole)
        return Request(self._post("/v1/images/edits", "multipart/form-data; boundary=b", whole), framed=True)

    def path(self) -> Request:
        """Any method and header at any path, or nearly one."""
        path = self._chance.choice(PATHS)
        if self._chance.random() < 0.4:
            path += "/" + quote(str(self._chance.choice(VALUES)), safe="/?#%", errors="replace")[:200]
        if self._chance.random() < 0.1:
            path = path.replace("/", self._chance.choice(["//", "/./", "/../", "%2F", "/%00", "\\"]))
        return Request(self._head(self._chance.choice(METHODS), path, {"content-length": "0"}), framed=False)

    def damaged(self) -> Request:
        """A whole request of which some bytes are others."""
        whole = self._chance.choice([self.fields, self.path, self.form])().raw
        return Request(self._damaged(whole), framed=False)

    def _body(self) -> bytes:
        body: dict[str, Any] = {"model": "flux/srpo", "prompt": "a red apple", "enable_safety_checker": False}
        for _ in range(self._chance.randint(1, 4)):
            body[self._chance.choice(FIELDS)] = self._value()
        return json.dumps(body, ensure_ascii=self._chance.random() < 0.7).encode("utf-8", "surrogatepass")

    def _value(self, depth: int = 0) -> Any:
        draw = self._chance.random()
        if depth < 3 and draw < 0.1:
            return [self._value(depth + 1) for _ in range(self._chance.randint(0, 4))]
        if depth < 3 and draw < 0.2:
            return {str(self._chance.choice(VALUES))[:20]: self._value(depth + 1) for _ in range(3)}
        if draw < 0.3:
            return self._chance.randint(-(2**65), 2**65)
        if draw < 0.4:
            return "".join(chr(self._chance.randrange(0x110000)) for _ in range(self._chance.randint(0, 30)))
        return self._chance.choice(VALUES)

    def _damaged(self, whole: bytes) -> bytes:
        damaged = bytearray(whole)
        for _ in range(self._chance.randint(1, 4)):
            at = self._chance.randrange(len(damaged) + 1)
            match self._chance.randrange(4):
                case 0:
                    damaged[at : at + self._chance.randint(0, 3)] = self._chance.randbytes(self._chance.randint(0, 3))
                case 1:
                    del damaged[at : at + self._chance.randint(1, 30)]
                case 2:
                    damaged[at:at] = damaged[: self._chance.randint(0, 60)]
                case 3:
                    damaged[at:at] = self._chance.choice(PIECES)
        return bytes(damaged)

    def _post(self, path: str, kind: str, body: bytes) -> bytes:
        return self._head("POST", path, {"content-type": kind, "content-length": str(len(body))}, few=True) + body

    def _head(self, method: str, path: str, fixed: Mapping[str, str], few: bool = False) -> bytes:
        headers = {"host": "127.0.0.1", "connection": "close", **fixed}
        if not few:
            for _ in range(self._chance.randint(0, 3)):
                headers[self._chance.choice(HEADERS)] = self._chance.choice(HEADER_VALUES)
        elif self._chance.random() < 0.2:
            headers["prefer"] = "respond-async"
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace")


KINDS: Mapping[str, Callable[[Mutations], Request]] = {
    "any value in a field": Mutations.fields,
    "damaged JSON": Mutations.body,
    "damaged forms": Mutations.form,
    "any method, header and path": Mutations.path,
    "damaged requests": Mutations.damaged,
}
