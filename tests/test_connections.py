"""Connections on a real port: deadlines for what a client has to send, and a limit of how many there are."""

import json
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from faults.good import PATH
from faults.strangers import HEADERS, UNREAD
from structlog.typing import EventDict
from support.instant import logged
from support.server import LiveServer, running
from support.strangers import SlowSockets
from support.waiting import LIMIT, within

CAP = 40


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that waits for headers for five seconds, started with a low soft limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with running(tmp_path_factory.mktemp("hurried"), header_timeout="5", body_timeout="5") as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class Narrow:
    url: str
    entries: list[EventDict]  # of its log

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port or 80

    def draw(self) -> int:
        """The status of a request for an image."""
        return httpx.post(self.url + PATH, json={"model": "flux/srpo", "prompt": "x"}, timeout=LIMIT).status_code


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Narrow]:
    """A server in this process with few connections, which waits for headers for an hour, and warns once in that."""
    options = {"header_timeout": 3600, "max_connections": CAP, "safety_checker": "none"}
    with (
        pytest.MonkeyPatch.context() as patch,
        logged(tmp_path_factory.mktemp("narrow"), **options) as (_, url, entries),
    ):
        patch.setattr("server.transport.protocol.WARN_EVERY", 3600.0)
        yield Narrow(url, entries)


def test_hundreds_of_sockets_that_drip_headers_or_nothing_are_closed_while_others_are_served(
    hurried: LiveServer,
) -> None:
    with SlowSockets(hurried.port, 300, HEADERS) as dripping, SlowSockets(hurried.port, 200, b"", patient=True) as idle:
        assert within(LIMIT, lambda: dripping.opened + idle.opened == 500)
        assert [hurried.generate().status_code for _ in range(5)] == [201] * 5
        assert within(LIMIT, lambda: dripping.closed == 300 and idle.closed == 200)
    assert set(idle.heard) == {b""}
    told = [heard for heard in dripping.heard if heard]  # not who had sent nothing when the time was over
    assert told
    for heard in told:
        head, _, body = heard.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert json.loads(body)["error"]["code"] == "header_timeout"


@pytest.mark.parametrize(
    "start", [UNREAD, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\nGET /hea"], ids=["a body", "a second request"]
)
def test_what_comes_after_a_reply_has_a_deadline_too(hurried: LiveServer, start: bytes) -> None:
    with SlowSockets(hurried.port, 5, start) as slow:
        assert within(LIMIT, lambda: slow.closed == 5)
    assert all(heard.startswith((b"HTTP/1.1 404", b"HTTP/1.1 200")) for heard in slow.heard)


def test_an_idle_connection_is_kept_after_a_reply(hurried: LiveServer) -> None:
    with SlowSockets(hurried.port, 1, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", patient=True) as kept:
        with SlowSockets(hurried.port, 1, b"", patient=True) as unused:
            assert within(LIMIT, lambda: kept.opened + unused.opened == 2)
            assert within(LIMIT, lambda: unused.closed == 1)
        assert kept.closed == 0


def test_the_limit_of_open_files_is_raised_to_the_hard_one(hurried: LiveServer) -> None:
    limits = Path(f"/proc/{hurried.process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    soft, hard = line.split()[3:5]
    assert soft == hard != "256"


def malformed(server: Narrow) -> float:
    """How many connections the server has refused as no valid HTTP, by its own count."""
    page = httpx.get(f"{server.url}/metrics", timeout=LIMIT).text
    return sum(map(float, re.findall(r'^srpo_http_requests_total{.*"malformed_request".*} (.*)$', page, re.MULTILINE)))


@pytest.mark.parametrize("size", [2**16, 2**23])
def test_headers_that_are_too_large_are_refused_before_they_have_come(narrow: Narrow, size: int) -> None:
    before = malformed(narrow)
    with socket.create_connection(("127.0.0.1", narrow.port), LIMIT) as connection:
        heard = b""
        with suppress(ConnectionError):  # closed in the middle: what it would say can be lost
            connection.sendall(HEADERS + b"x" * size)
        with suppress(ConnectionError):
            while piece := connection.recv(2**16):
                heard += piece
    assert not heard or heard.startswith(b"HTTP/1.1 400 ")
    assert malformed(narrow) == before + 1


@pytest.mark.parametrize(("piece", "status"), [(b"1\r\n \r\n", b"400"), (b"20\r\n" + b" " * 32 + b"\r\n", b"201")])
def test_a_body_in_pieces_of_a_byte_is_refused(narrow: Narrow, piece: bytes, status: bytes) -> None:
    """Reading them took seconds, in which nobody else was answered."""
    body = b'{"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1}'
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n".encode()
    whole = head + b"transfer-encoding: chunked\r\n\r\n" + 20_000 * piece + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    before = malformed(narrow)
    with socket.create_connection(("127.0.0.1", narrow.port), LIMIT) as connection:
        with suppress(ConnectionError):  # closed while it is sent
            connection.sendall(whole)
        heard = b""
        with suppress(ConnectionError):
            heard = connection.recv(2**16)
    assert heard.startswith(b"HTTP/1.1 " + status) or (not heard and status == b"400")
    assert malformed(narrow) == before + (status == b"400")


def test_a_new_connection_takes_the_place_of_the_longest_quiet_one(narrow: Narrow) -> None:
    with SlowSockets(narrow.port, 4 * CAP, HEADERS) as slow:
        assert within(LIMIT, lambda: slow.opened == 4 * CAP)
        assert [narrow.draw() for _ in range(5)] == [201] * 5
        assert within(LIMIT, lambda: slow.closed >= 3 * CAP)
        assert slow.opened - slow.closed <= CAP
    assert [entry["event"] for entry in narrow.entries].count("connections_full") == 1


def test_where_all_connections_are_being_answered_one_more_is_refused(narrow: Narrow) -> None:
    body = b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    with ExitStack() as stack:
        groups: list[SlowSockets] = []

        def hold(count: int) -> None:
            unread = body + b"content-length: 1000000\r\n\r\n{"
            groups.append(stack.enter_context(SlowSockets(narrow.port, count, unread, patient=True)))
            assert within(LIMIT, lambda: groups[-1].opened == count)

        def is_full() -> bool:
            """A connection whose request has not been read yet gives its place to the next one: there is another."""
            if (missing := CAP - sum(group.opened - group.closed for group in groups)) > 0:
                hold(missing)
            return refusal(narrow) is not None

        assert within(LIMIT, is_full)
        reply = refusal(narrow)
        assert reply is not None
        assert reply.json()["error"]["code"] == "too_many_connections"
        assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
        assert {"x-request-id", "x-inference-id"} < set(reply.headers)
        assert reply.headers["x-served-model"] == "tiny"
    assert within(LIMIT, lambda: refusal(narrow) is None)


def refusal(server: Narrow) -> httpx.Response | None:
    reply = httpx.get(f"{server.url}/health")
    return reply if reply.status_code == 503 else None
