"""Attacks on what must stay closed: routes without a key, other hosts and pages, addresses and files inside."""

import itertools
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
from faults.good import GOOD, KEY, PATH, count_images, draw_quietly, judge_reply
from faults.outcome import Fault, Server, Tally
from faults.strangers import count_attacks, repeated, through
from faults.workers import worker
from support.jobs import KEYS, PREFER
from support.pictures import Peer
from support.server import START_LIMIT, LiveServer
from support.waiting import LIMIT

from server.app import ROUTERS

OPEN = re.compile(  # what needs no key, by the contract
    r"/|/health|/ready|/(v1/)?models(/.*)?|/files/.*|/docs(/.*)?|/playground/.*|/openapi.json"
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")
HOSTS = ("127.0.0.1", "127.0.0.1/health?", "x/?", "x/#", "", "/health", "127.0.0.1\\@x")
AUTHORIZATIONS = (
    "",
    "Bearer",
    "Bearer ",
    "Bearer null",
    "Basic Zmlyc3Qta2V5",
    f"Bearer {KEYS[0]}x",
    f"Bearer {KEYS[0][:-1]}",
)
INWARD = (
    "127.0.0.1",
    "127.1",
    "0",
    "0.0.0.0",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "localhost",
)
KEYED = Server("with keys", {"api_keys": ",".join(KEYS)})
PLAIN = Server("plain")


# Refusals are held back once many came from one address: each of loopback's sends a few.
_sources = (f"127.{first}.{second}.1" for first in range(256) for second in range(1, 256) for _ in range(10))


def send(server: LiveServer, raw: bytes, source: str = "127.0.0.1") -> bytes:
    """What a server answers to raw bytes, until it closes the connection or is silent for two seconds."""
    heard = b""
    with socket.create_connection(("127.0.0.1", server.port), LIMIT, (source, 0)) as connection:
        connection.settimeout(2)
        with suppress(OSError):
            connection.sendall(raw)
            while part := connection.recv(2**16):
                heard += part
    return heard


def paths() -> list[str]:
    """One path for each route of the server."""
    routes = [route.path for router in ROUTERS for route in router.routes]
    return sorted({re.sub(r"{[^}]*}", "abc", path) for path in routes} | {"/metrics", "/openapi.json"})


def spellings(path: str) -> tuple[str, ...]:
    encoded = path.replace("v1", "%76%31")
    return path, f"{path}/", f"/{path}", f"http://127.0.0.1{path}", encoded, f"/health/..{path}"


@contextmanager
def without_a_key(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Every route, by every method, in every spelling, for every host: what is not open answers no 2xx."""

    def attack(method: str, path: str, host: str = HOSTS[0], authorization: str = "") -> str | None:
        head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ncontent-length: 0\r\n"
        raw = head + (f"authorization: {authorization}\r\n" if authorization else "") + "\r\n"
        status = re.match(rb"HTTP/1\.1 2\d\d", send(server, raw.encode(), next(_sources)))
        return f"{method} {path} for host {host!r}: {status[0].decode()}" if status else None

    closed = [path for path in paths() if not OPEN.fullmatch(path)]
    results = [attack(method, spelled) for method in METHODS for path in closed for spelled in spellings(path)]
    results += [attack("GET", path, host) for path in closed for host in HOSTS[1:]]
    results += [attack("GET", "/v1/jobs", authorization=authorization) for authorization in AUTHORIZATIONS]
    count_attacks(tally, results)
    tally.figure = f"{len(closed)} closed routes"
    yield


def offer_wrong_key(server: LiveServer) -> str | None:
    headers = {"authorization": "Bearer wrong-key"}
    return through(httpx.get(f"{server.url}/v1/jobs", headers=headers, timeout=START_LIMIT), 401)


_addresses = itertools.count()


def offer_wrong_key_from_anywhere(server: LiveServer) -> str | None:
    """Each time with another forwarded address, which nobody vouches for."""
    number = next(_addresses)
    headers = {"authorization": "Bearer wrong-key", "x-forwarded-for": f"198.51.100.{number % 256}"}
    return through(httpx.get(f"{server.url}/v1/jobs", headers=headers, timeout=START_LIMIT), 401)


@contextmanager
def crowd(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Sixty durable jobs of the second key, each of 200 steps; they are cancelled at the end."""
    body = GOOD | {"image_size": "square_hd", "num_inference_steps": 50, "num_images": 4, "acceleration": "none"}
    with server.client(headers={"authorization": f"Bearer {KEYS[1]}", **PREFER}) as client:
        jobs = [client.post(PATH, json=body).json()["id"] for _ in range(60)]
        yield
        for job in jobs:
            client.delete(f"/v1/jobs/{job}")


@contextmanager
def guessed_addresses(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Image names that are nearly right, paths that lead elsewhere, and a link in the store to a file outside."""
    url = httpx.post(server.url + PATH, json=GOOD | {"response_format": "url"}, headers=KEY, timeout=START_LIMIT).json()
    name = url["images"][0]["url"].rpartition("/")[2]
    stem, _, suffix = name.rpartition(".")
    secret = server.data_dir.parent / "secret.png"
    secret.write_bytes(b"secret")
    folder = next(path.parent for path in (server.data_dir / "images").rglob(name))
    link = folder / f"{stem[:-1]}{'A' if stem[-1] != 'A' else 'B'}.{suffix}"
    link.symlink_to(secret)
    guesses = [f"{stem[:-1]}{letter}.{suffix}" for letter in "0123456789abcdefghij" if letter != stem[-1]]
    guesses += [
        "../jobs.sqlite3",
        "..%2fjobs.sqlite3",
        "%2e%2e/jobs.sqlite3",
        "..%5cjobs.sqlite3",
        "%00",
        "/etc/passwd",
    ]
    guesses += ["....//jobs.sqlite3", link.name, f"{name}%00.png", f"{name}/../{name}.json", "."]

    def attack(guess: str) -> str | None:
        heard = send(server, f"GET /files/{guess} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
        return f"/files/{guess}" if heard.startswith(b"HTTP/1.1 2") or b"secret" in heard else None

    count_attacks(tally, [attack(guess) for guess in guesses])
    tally.figure = f"names of {len(stem)} characters"
    link.unlink()
    yield


@contextmanager
def retries(server: LiveServer, tally: Tally) -> Iterator[None]:
    """An SDK that sends a request three times, the second and third because it lost patience."""
    wanted = draw_quietly(server, 3, 20)
    admitted, body = count_admitted(server), GOOD | {"seed": 3, "num_inference_steps": 20}

    def ask(tries: int, patience: float) -> httpx.Response:
        headers = {**KEY, "x-stainless-retry-count": str(tries)}
        return httpx.post(server.url + PATH, json=body, headers=headers, timeout=patience)

    drawing = psutil.Process(worker(server))
    drawing.suspend()  # however fast it is, nobody gets a reply before patience is lost
    try:
        for tries in range(2):
            with suppress(httpx.TimeoutException):
                judge_reply(tally, ask(tries, 0.3), wanted)
    finally:
        drawing.resume()
    judge_reply(tally, ask(2, START_LIMIT), wanted)
    tally.duplicated += count_admitted(server) - admitted - 1
    yield


def count_admitted(server: LiveServer) -> int:
    """Requests that became work of their own since the server's start."""
    told = httpx.get(server.url + "/metrics", headers=KEY, timeout=LIMIT).text
    return int(float(re.search(r"^srpo_requests_admitted_total (\S+)$", told, re.MULTILINE)[1]))  # type: ignore[index]


@contextmanager
def listeners(server: LiveServer, tally: Tally) -> Iterator[None]:
    """What the server and its children listen on."""
    process = psutil.Process(server.process.pid)
    sockets = {
        (connection.laddr.ip, connection.laddr.port)
        for one in [process, *process.children(recursive=True)]
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    count_attacks(
        tally, [None if address == ("127.0.0.1", server.port) else f"listens on {address}" for address in sockets]
    )
    yield


@contextmanager
def foreign_pages(server: LiveServer, tally: Tally) -> Iterator[None]:
    """What a web page elsewhere can make a browser send: simple content types, and names that lead to loopback."""
    stored = count_images(server)
    attacks = [
        {"origin": origin, "content-type": kind, "host": host}
        for origin in ("https://evil.example", "null")
        for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded")
        for host in (f"127.0.0.1:{server.port}", f"evil.example:{server.port}")
    ]
    raw = json.dumps(GOOD)
    results = [
        through(httpx.post(server.url + PATH, content=raw, headers=headers, timeout=START_LIMIT), 400, 403)
        for headers in attacks
    ]
    results += [through(httpx.get(f"{server.url}/v1/jobs", headers={"host": "evil.example"}, timeout=START_LIMIT), 400)]
    count_attacks(tally, results + ["an image was drawn"] * (count_images(server) - stored))
    yield


@contextmanager
def inward_addresses(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Source pictures from addresses of this machine: nobody there may hear of it."""
    inside = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\n\r\nsecret")
    port = inside.url.split(":")[2].split("/")[0]
    body = GOOD | {"model": "flux/srpo/image-to-image"}

    def attack(host: str) -> str | None:
        sent = body | {"image_url": f"http://{host}:{port}/a.png"}
        return through(httpx.post(server.url + PATH, json=sent, timeout=START_LIMIT), 400)

    results = [attack(host) for host in INWARD]
    inside.close()
    count_attacks(tally, results + ["connected to"] * inside.connections)
    yield


FAULTS = (
    Fault("every route without a key", "12 36", without_a_key, KEYED),
    Fault("wrong keys without end", "14", repeated(offer_wrong_key, 20), KEYED),
    Fault("wrong keys from made-up addresses", "14", repeated(offer_wrong_key_from_anywhere, 20), KEYED),
    Fault("60 large requests of another key", "D7", crowd, KEYED),
    Fault("image names guessed, paths outwards, a link", "19 21", guessed_addresses, KEYED),
    Fault("an SDK loses patience twice", "35", retries, PLAIN),
    Fault("what listens", "26", listeners, PLAIN, 1),
    Fault("other web pages and host names", "27", foreign_pages, PLAIN, 1),
    Fault("source pictures from inside", "15", inward_addresses, PLAIN, 1),
)
