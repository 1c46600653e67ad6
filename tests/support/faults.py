"""What a server does for good clients while something is wrong, measured: one row a fault.

A fault is a context manager that returns when it holds. `measure` sends good requests while it does, and compares their
bytes with those of a quiet server.
"""

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from support.jobs import KEYS, PREFER
from support.pictures import file_of
from support.server import START_LIMIT, LiveServer, running
from support.strangers import SlowSockets
from support.waiting import LIMIT, within

MIB = 2**20
PATH = "/v1/images/generations"
HOST = "host: 127.0.0.1\r\n"
HEADERS = f"POST {PATH} HTTP/1.1\r\n{HOST}x-slow: ".encode()
UNREAD = f"POST /nothing HTTP/1.1\r\n{HOST}content-length: 1000000000\r\n\r\n".encode()
GOOD = {
    "model": "flux/srpo",
    "prompt": "x",
    "image_size": "square",
    "num_inference_steps": 1,
    "response_format": "b64_json",
    "output_format": "png",
}
VALUES = b'{"a":[' + b"1," * 7_000_000 + b"1]}"


@dataclass(frozen=True)
class Outcome:
    """A row: requests, seconds from the fault's end to the next reply, and the server's peak memory in bytes."""

    case: str
    offered: int
    accepted: int  # not refused
    finished: int
    lost: int  # accepted, and never answered
    duplicated: int  # answered twice with one work's identity, or drawn twice
    wrong: int  # bytes that a quiet server would not have drawn
    recovery: float
    peak: int  # more than before the fault

    def __str__(self) -> str:
        return " | ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Fault:
    """A fault for the table: how it is made to hold, and the settings of its server."""

    hold: Callable[[LiveServer], AbstractContextManager[object]]
    settings: Mapping[str, str] = field(default_factory=dict)


def body_head(path: str, length: int, kind: str) -> bytes:
    """A request's headers, whose body is still to come."""
    return f"POST {path} HTTP/1.1\r\n{HOST}content-length: {length}\r\ncontent-type: {kind}\r\n\r\n".encode()


STALLED_JSON = body_head(PATH, 16 * MIB - 1, "application/json") + b'{"x":"' + b"a" * (15 * MIB)
STALLED_FORM = (
    body_head("/v1/images/edits", 16 * MIB - 1, "multipart/form-data; boundary=b")
    + b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'
    + b"a" * (15 * MIB)
)


@contextmanager
def sockets(server: LiveServer, count: int, start: bytes, *, patient: bool = False) -> Iterator[SlowSockets]:
    with SlowSockets(server.port, count, start, patient=patient) as held:
        assert within(LIMIT, lambda: held.opened == count)
        yield held


@contextmanager
def repeated(call: Callable[[], object], threads: int = 4) -> Iterator[None]:
    """The same call again and again, from several threads, until the fault ends."""
    going = True

    def repeat() -> None:
        while going:
            call()

    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(repeat) for _ in range(threads)]
        try:
            yield
        finally:
            going = False
    for ended in calls:
        ended.result()


def post_values(server: LiveServer) -> int:
    headers = {"content-type": "application/json"}
    return httpx.post(server.url + PATH, content=VALUES, headers=headers, timeout=START_LIMIT).status_code


def post_large_picture(server: LiveServer) -> int:
    """33 megapixels in some kilobytes."""
    files = {"image": ("a.png", file_of(Image.new("P", (5792, 5792))), "image/png")}
    form = {"prompt": "x", "num_inference_steps": "1", "strength": "0.1"}
    return httpx.post(f"{server.url}/v1/images/edits", data=form, files=files, timeout=START_LIMIT).status_code


def offer_wrong_key(server: LiveServer) -> int:
    headers = {"authorization": "Bearer wrong-key"}
    return httpx.get(f"{server.url}/v1/jobs", headers=headers, timeout=START_LIMIT).status_code


@contextmanager
def crowd(server: LiveServer) -> Iterator[None]:
    """Sixty durable jobs of the second key, each of 200 steps; they are cancelled at the end."""
    body = {"model": "flux/srpo", "prompt": "x", "image_size": "square_hd", "num_inference_steps": 50, "num_images": 4}
    headers = {"authorization": f"Bearer {KEYS[1]}", **PREFER}
    with server.client(headers=headers) as client:
        jobs = [client.post(PATH, json=body).json()["id"] for _ in range(60)]
        yield
        for job in jobs:
            client.delete(f"/v1/jobs/{job}")


@contextmanager
def signalled(server: LiveServer, number: int) -> Iterator[None]:
    """The worker gets a signal, and the server has to find out by itself."""
    [worker] = httpx.get(f"{server.url}/health", timeout=LIMIT).json()["worker_pids"]
    os.kill(worker, number)
    yield


@contextmanager
def locked_ledger(server: LiveServer) -> Iterator[None]:
    """Another program writes into the job database and does not come to an end."""
    with closing(sqlite3.connect(server.data_dir / "jobs.sqlite3", timeout=LIMIT, isolation_level=None)) as ledger:
        ledger.execute("BEGIN EXCLUSIVE")
        yield


TWO_KEYS = {"api_keys": ",".join(KEYS)}
FAULTS: Mapping[str, Fault] = {
    "300 sockets drip headers": Fault(lambda server: sockets(server, 300, HEADERS), {"header_timeout": "3600"}),
    "500 sockets say nothing": Fault(
        lambda server: sockets(server, 500, b"", patient=True), {"header_timeout": "3600", "max_connections": "100"}
    ),
    "100 sockets drip a body that nobody reads": Fault(lambda server: sockets(server, 100, UNREAD)),
    "30 bodies of 15 MB stall": Fault(
        lambda server: sockets(server, 30, STALLED_JSON, patient=True), {"uploads": "64MiB", "body_timeout": "3600"}
    ),
    "30 forms of 15 MB stall": Fault(
        lambda server: sockets(server, 30, STALLED_FORM, patient=True), {"uploads": "64MiB", "body_timeout": "3600"}
    ),
    "wrong keys without end": Fault(lambda server: repeated(lambda: offer_wrong_key(server), 20), TWO_KEYS),
    "60 large requests of another key": Fault(crowd, TWO_KEYS),
    "millions of JSON values": Fault(lambda server: repeated(lambda: post_values(server))),
    "the worker is killed": Fault(lambda server: signalled(server, signal.SIGKILL)),
    "the worker stops": Fault(lambda server: signalled(server, signal.SIGSTOP), {"worker_timeout": "5"}),
    "the job database is locked": Fault(locked_ledger),
    "pictures of 33 megapixels": Fault(lambda server: repeated(lambda: post_large_picture(server), 2)),
}


def peak_memory(server: LiveServer) -> int:
    """Bytes of the API process's resident memory at most since `reset_peak`."""
    return int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def reset_peak(server: LiveServer) -> None:
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


def draw(server: LiveServer, seed: int) -> httpx.Response | None:
    """The reply to a good request, with the picture in it; None where there is no reply at all."""
    try:
        with server.client(headers={"authorization": f"Bearer {KEYS[0]}"}) as client:
            return client.post(PATH, json=GOOD | {"seed": seed})
    except httpx.TransportError:
        return None


def pictures(reply: httpx.Response | None) -> Any:
    return [item["b64_json"] for item in reply.json()["data"]] if reply is not None and reply.is_success else None


def measure(case: str, server: LiveServer, fault: AbstractContextManager[object], requests: int = 5) -> Outcome:
    """Send good requests, one after the other, while the fault holds."""
    seeds = range(1, requests + 1)
    expected = [pictures(draw(server, seed)) for seed in seeds]
    reset_peak(server)
    before = peak_memory(server)
    with fault:
        replies = [draw(server, seed) for seed in seeds]
        peak = peak_memory(server)
    ended = time.monotonic()
    assert within(LIMIT, lambda: (reply := draw(server, 1)) is not None and reply.is_success)
    recovery = time.monotonic() - ended
    answered = [reply for reply in replies if reply is not None]
    drawn = [(pictures(reply), wanted) for reply, wanted in zip(replies, expected, strict=True) if pictures(reply)]
    works = [reply.headers["x-inference-id"] for reply in answered]
    return Outcome(
        case,
        offered=requests,
        accepted=requests - sum(reply.status_code in (408, 413, 429, 503) for reply in answered),
        finished=len(drawn),
        lost=requests - len(answered),
        duplicated=len(works) - len(set(works)),
        wrong=sum(got != wanted for got, wanted in drawn),
        recovery=recovery,
        peak=peak - before,
    )


def run_fault(case: str, folder: Path) -> Outcome:
    """A row of `FAULTS` on a server of its own."""
    fault = FAULTS[case]
    with running(folder, safety_checker="none", **fault.settings) as server:
        return measure(case, server, fault.hold(server))
