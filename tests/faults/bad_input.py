"""Requests that are wrong: values at every bound, letters that break parsers and logs, ambiguous framing."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from faults.access import send
from faults.good import GOOD, PATH
from faults.outcome import Fault, Server, Tally
from faults.strangers import count_attacks
from support.server import START_LIMIT, LiveServer

PLAIN = Server("plain")
FIELDS = (
    "seed",
    "num_inference_steps",
    "num_images",
    "guidance_scale",
    "image_size",
    "prompt",
    "sync_mode",
    "size",
    "n",
)
NUMBERS = (
    "0",
    "-1",
    str(2**63),
    str(2**64),
    "9" * 5000,
    "1e999",
    "NaN",
    "Infinity",
    "-Infinity",
    "0x1",
    "1.5e0.5",
    "true",
)
TEXTS = ('"\\ud800"', '"\\u0000\\udfff"', '["\\ud800"]', '{"\\udc00": 1}', "[" * 2000 + "]" * 2000, "\x00", "'a'")
INSIDE = re.compile(r"0x[0-9a-f]{6,}|Traceback|site-packages|\.py\b|sqlalchemy|pydantic", re.IGNORECASE)
POST = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n".encode()
NEXT = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
AMBIGUOUS = {
    "two lengths": b"content-length: 2\r\ncontent-length: 4\r\n\r\n{}",
    "length and chunks": b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks twice": b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a chunk that ends wrongly": b"transfer-encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
    "a chunk of negative length": b"transfer-encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    "a length with a sign": b"content-length: +2\r\n\r\n{}",
    "a header with a blank": b"content-length : 2\r\n\r\n{}",
}


@contextmanager
def values_at_every_bound(server: LiveServer, tally: Tally) -> Iterator[None]:
    """None of them is a 5xx, and no refusal names anything inside the server."""

    def attack(field: str, value: str) -> str | None:
        raw = json.dumps({name: part for name, part in GOOD.items() if name != field})[:-1] + f', "{field}": {value}}}'
        reply = httpx.post(
            server.url + PATH, content=raw.encode(), headers={"content-type": "application/json"}, timeout=START_LIMIT
        )
        if reply.status_code >= 500 or (
            reply.is_error and INSIDE.search(reply.text)
        ):  # pictures' base64 has any letters
            return f"{reply.status_code} for {field}: {value[:20]}"
        return None

    count_attacks(tally, [attack(field, value) for field in FIELDS for value in (*NUMBERS, *TEXTS)])
    yield


@contextmanager
def ambiguous_framing(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Requests that end at one place or another: what follows them on the connection is not answered."""

    def attack(name: str) -> str | None:
        heard = send(server, POST + AMBIGUOUS[name] + NEXT)
        statuses = re.findall(rb"HTTP/1\.1 (\d{3})", heard)
        return f"{name}: {statuses}" if b"200" in statuses or b"201" in statuses else None

    pieces = b"".join(b"1\r\n \r\n" for _ in range(200_000))
    many = send(server, POST + b"transfer-encoding: chunked\r\n\r\n" + pieces + b"2\r\n{}\r\n0\r\n\r\n")
    results = [attack(name) for name in AMBIGUOUS]
    shredded = None if not many or many.startswith(b"HTTP/1.1 4") else f"200,000 pieces: {many[:15]!r}"
    count_attacks(tally, [*results, shredded])
    yield


@contextmanager
def forged_lines(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Line ends and terminal codes in prompts, headers and paths: no header and no line of the log is made of them."""
    forged = 'forged\r\nset-cookie: a=b\r\n\x1b[31m{"event": "forged"}'
    replies = [
        httpx.post(server.url + PATH, json=GOOD | {"prompt": forged, forged: 1}, timeout=START_LIMIT),
        httpx.get(f"{server.url}/{'%0d%0aset-cookie:%20a=b%1b[31m'}", timeout=START_LIMIT),
        httpx.get(f"{server.url}/health", headers={"x-client-request-id": "a b\x7fc"}, timeout=START_LIMIT),
    ]
    results = ["a header was split" if "set-cookie" in reply.headers else None for reply in replies]
    lines = server.settled_log().splitlines()
    results += [
        "a line of the log was forged" for line in lines if line.startswith(("set-cookie", '{"event": "forged"'))
    ]
    results += ["a terminal code in the log" for line in lines if "\x1b[31m" in line]
    count_attacks(tally, results)
    yield


FAULTS = (
    Fault("values at every bound in every field", "6 7 8 18", values_at_every_bound, PLAIN, 1),
    Fault("framing that means two things", "41", ambiguous_framing, PLAIN, 1),
    Fault("line ends and terminal codes", "38", forged_lines, PLAIN, 1),
)
