"""Faults by strangers: connections that drip or say nothing, bodies without end, pictures and values by the million."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import psutil
from faults.good import GOOD, KEY, PATH, health
from faults.outcome import MIB, Fault, Hold, Server, Tally
from PIL import Image
from support.pictures import file_of
from support.server import START_LIMIT, LiveServer
from support.strangers import SlowSockets
from support.waiting import LIMIT, within

GOOD_READS = int(os.environ.get("READS", "90"))  # good requests, beside those for images, while sockets are held
HOST = "host: 127.0.0.1\r\n"
HEADERS = f"POST {PATH} HTTP/1.1\r\n{HOST}x-slow: ".encode()
UNREAD = f"POST /nothing HTTP/1.1\r\n{HOST}content-length: 1000000000\r\n\r\n".encode()
VALUES = b'{"a":[' + b"1," * 7_000_000 + b"1]}"
PATIENT = Server("patient", {"header_timeout": "3600", "body_timeout": "3600", "uploads": "64MiB"})
NARROW = Server("narrow", {"header_timeout": "3600", "max_connections": "100"})


def body_head(path: str, length: int, kind: str) -> bytes:
    """A request's headers, whose body is still to come."""
    return f"POST {path} HTTP/1.1\r\n{HOST}content-length: {length}\r\ncontent-type: {kind}\r\n\r\n".encode()


STALLED_JSON = body_head(PATH, 16 * MIB - 1, "application/json") + b'{"x":"' + b"a" * (15 * MIB)
STALLED_FORM = (
    body_head("/v1/images/edits", 16 * MIB - 1, "multipart/form-data; boundary=b")
    + b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'
    + b"a" * (15 * MIB)
)


def sockets(count: int, start: bytes, *, patient: bool = False) -> Hold:
    """So many connections that send `start`, and then a byte at a time for ever; `patient` ones send no more."""

    @contextmanager
    def hold(server: LiveServer, tally: Tally) -> Iterator[None]:
        with SlowSockets(server.port, count, start, patient=patient) as held:
            assert within(LIMIT, lambda: held.opened == count)
            yield
            tally.figure = f"{count - held.closed} held to the end"

    return hold


def repeated(attack: Callable[[LiveServer], str | None], threads: int = 4) -> Hold:
    """The same attack again and again, from several threads. It returns what it got and must not get."""

    @contextmanager
    def hold(server: LiveServer, tally: Tally) -> Iterator[None]:
        going = True

        def repeat() -> list[str | None]:
            results = []
            while going:
                results.append(attack(server))
            return results

        with ThreadPoolExecutor(threads) as pool:
            calls = [pool.submit(repeat) for _ in range(threads)]
            try:
                yield
            finally:
                going = False
        count_attacks(tally, [result for ended in calls for result in ended.result()])

    return hold


def count_attacks(tally: Tally, results: list[str | None]) -> None:
    tally.attacks += len(results)
    tally.let_through += [result for result in results if result is not None]


def through(reply: httpx.Response, *allowed: int) -> str | None:
    """What a bad request got and must not: None where its status is one of `allowed`."""
    return None if reply.status_code in allowed else f"{reply.status_code} for {reply.request.url.path}"


def post_values(server: LiveServer) -> str | None:
    """Refused as what it is, or for want of room: the bodies of the case before may not be quite gone."""
    headers = {"content-type": "application/json"}
    reply = httpx.post(server.url + PATH, content=VALUES, headers=headers, timeout=START_LIMIT)
    full = reply.status_code == 503 and reply.json()["error"]["code"] == "uploads_full"
    return None if full else through(reply, 400)


def post_large_picture(server: LiveServer) -> str | None:
    """33 megapixels in some kilobytes: a right request, that costs much."""
    files = {"image": ("a.png", file_of(Image.new("P", (5792, 5792))), "image/png")}
    form = {"prompt": "x", "num_inference_steps": "1", "strength": "0.1"}
    return through(httpx.post(f"{server.url}/v1/images/edits", data=form, files=files, timeout=START_LIMIT), 201)


def post_hard_prompt(server: LiveServer) -> str | None:
    """As long as a prompt may be, each character of which becomes eighteen, and one that is longer."""
    reply = httpx.post(server.url + PATH, json=GOOD | {"prompt": "\ufdfa" * 4001}, timeout=START_LIMIT)
    return through(reply, 400) or through(
        httpx.post(server.url + PATH, json=GOOD | {"prompt": "\ufdfa" * 4000}, timeout=START_LIMIT), 201
    )


@contextmanager
def endless_bodies(server: LiveServer, tally: Tally) -> Iterator[None]:
    """One of 100 MB, and one in pieces without end: each is refused before it is over."""

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b"a" * MIB

    def post(**content: object) -> str | None:
        headers = {"content-type": "application/json"}
        with suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):  # closed while it is sent
            return through(httpx.post(server.url + PATH, headers=headers, timeout=START_LIMIT, **content), 413, 503)  # type: ignore[arg-type]
        return None

    count_attacks(tally, [post(content=b"a" * (100 * MIB)), post(content=pieces())])
    yield


@contextmanager
def long_headers(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Of 64 KiB and of 8 MiB."""

    def send(size: int) -> str | None:
        heard = b""
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as connection, suppress(ConnectionError):
            connection.sendall(HEADERS + b"x" * size + b"\r\n\r\n")
            heard = connection.recv(2**16)
        return None if not heard or heard.startswith(b"HTTP/1.1 400 ") else heard[:20].decode("latin-1")

    count_attacks(tally, [send(size) for size in (2**16, 2**23)])
    yield


@contextmanager
def bombs(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Small files that are large pictures, or that no picture reader of ours opens."""
    large = Image.new("1", (19_000, 19_000))
    files = {
        "PNG of 361 megapixels": file_of(large),
        "TIFF of 361 megapixels": file_of(large, "TIFF", compression="group4"),
        "WebP of 64 megapixels": file_of(Image.new("RGB", (8000, 8000)), "WEBP", method=0, lossless=True),
        "GIF of 300 frames": file_of(
            Image.new("P", (2000, 2000)), "GIF", save_all=True, append_images=[Image.new("P", (2000, 2000))] * 300
        ),
    }
    form = {"prompt": "x", "num_inference_steps": "1"}

    def post(name: str) -> str | None:
        files_sent = {"image": ("a.png", files[name], "image/png")}
        reply = httpx.post(f"{server.url}/v1/images/edits", data=form, files=files_sent, timeout=START_LIMIT)
        return None if reply.status_code in (400, 413) else f"{reply.status_code} for a {name}"

    count_attacks(tally, [post(name) for name in files])
    yield


@contextmanager
def many_ranges(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Ten thousand ranges of one image, which one parser took quadratic time for."""
    body = GOOD | {"response_format": "url", "seed": 1}
    url = httpx.post(server.url + PATH, json=body, timeout=START_LIMIT).json()["images"][0]["url"]
    ranges = "bytes=" + ",".join(f"{start}-{start + 1}" for start in range(0, 20_000, 2))
    process = psutil.Process(server.process.pid)
    before = sum(process.cpu_times()[:2])
    replies = [
        httpx.get(url, headers={"range": part}, timeout=START_LIMIT) for part in [ranges[:60_000], "bytes=-0", "x"]
    ]
    tally.figure = f"{1000 * (sum(process.cpu_times()[:2]) - before) / 3:.0f} ms of CPU each"
    count_attacks(tally, [through(reply, 200, 206, 400, 416) for reply in replies])
    yield


@contextmanager
def leaving_clients(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Fifty clients that leave half a second after they have asked for minutes of work."""
    body = httpx.Request(
        "POST",
        server.url + PATH,
        json=GOOD | {"num_inference_steps": 50, "num_images": 4, "image_size": "square_hd", "acceleration": "none"},
    )
    raw = f"POST {PATH} HTTP/1.1\r\n{HOST}content-type: application/json\r\n".encode()
    raw += f"content-length: {len(body.content)}\r\n\r\n".encode() + body.content
    with SlowSockets(server.port, 50, raw, patient=True) as held:
        assert within(LIMIT, lambda: held.opened == 50)
        assert within(LIMIT, lambda: health(server)["running"] + health(server)["waiting"] > 40)
        time.sleep(0.5)
    left = time.monotonic()
    assert within(START_LIMIT, lambda: health(server)["running"] + health(server)["waiting"] == 0)
    tally.figure = f"dropped after {time.monotonic() - left:.1f} s"
    yield


@contextmanager
def busy_connections(server: LiveServer, tally: Tally) -> Iterator[None]:
    """More connections than may be open, each asking for something: nobody's request is cut off."""
    with ThreadPoolExecutor(60) as pool:
        calls = [pool.submit(httpx.get, f"{server.url}/v1/jobs", headers=KEY, timeout=START_LIMIT) for _ in range(300)]
        yield
    tally.figure = f"{sum(call.result().status_code == 200 for call in calls)} of 300 answered"


STALLED = Fault("30 bodies of 15 MB stall", "9 D14", sockets(30, STALLED_JSON, patient=True), PATIENT)
SILENT = Fault("500 sockets say nothing, 100 may be open", "11 D6", sockets(500, b"", patient=True), NARROW, 3, 10)
FAULTS = (
    Fault("500 sockets drip headers", "11 D6", sockets(500, HEADERS), PATIENT, 10, GOOD_READS),
    Fault("100 sockets drip a body that nobody reads", "11", sockets(100, UNREAD), PATIENT),
    STALLED,
    Fault("30 forms of 15 MB stall", "9 D14", sockets(30, STALLED_FORM, patient=True), PATIENT),
    Fault("bodies of 100 MB", "9", endless_bodies, PATIENT),
    Fault("headers of 64 KB and 8 MB", "10", long_headers, PATIENT),
    Fault("millions of JSON values", "34 D14", repeated(post_values), PATIENT),
    Fault("prompts that are hard to read", "34", repeated(post_hard_prompt, 1), PATIENT),
    Fault("pictures of 33 megapixels", "17", repeated(post_large_picture, 2), PATIENT),
    Fault("decompression bombs", "17", bombs, PATIENT),
    Fault("10,000 ranges of one image", "20", many_ranges, PATIENT),
    Fault("50 clients leave", "28", leaving_clients, PATIENT),
    SILENT,
    Fault("300 requests at once, 100 may be open", "11", busy_connections, NARROW),
)
