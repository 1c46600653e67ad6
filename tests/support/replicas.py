"""Several server processes over one Postgres and one bucket, behind nginx; and clients that do not give up."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psycopg
from support.buckets import S3Service, running_s3
from support.jobs import KEYS, PREFER
from support.nginx import running_nginx
from support.postgres import Postgres, running_postgres
from support.server import START_LIMIT, LiveServer, free_port, running
from support.tcp_proxy import TcpProxy, proxy_to
from support.waiting import LIMIT, within

from server.images.stores.s3 import PROBE

PATH = "/v1/images/generations"
BODY: dict[str, Any] = {"model": "flux/srpo", "prompt": "slow", "image_size": "square", "num_inference_steps": 12}
LEASE = 3.0  # seconds
PATIENCE = 8.0  # seconds for which a client waits for a reply
GIVES_UP = 90.0  # seconds after which a request counts as lost
PASSING = (429, 502, 503, 504)
TESTS = Path(__file__).parent.parent


class Replica:
    """One server process. It can be killed, stopped, and started again."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.port = free_port()
        self.folder = folder
        self._env = env
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "support.replica", str(self.port), str(self.folder)]
            self.process = subprocess.Popen(command, env=self._env, stdout=log, stderr=log)

    def wait_ready(self) -> None:
        assert within(START_LIMIT, self._is_ready), (self.folder / "log").read_text()

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(number)
            self.process.wait()

    def name(self) -> str:
        """Its own, in the database."""
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        name: str = self._ask("/health", headers=headers).json()["replica"]
        return name

    def is_idle(self) -> bool:
        """Whether it works at nothing, also not at what was taken over from it meanwhile."""
        health = self._ask("/health").json()
        return not (health["running"] or health["waiting"])

    def _is_ready(self) -> bool:
        try:
            return self._ask("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _ask(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=LIMIT, **options)


@dataclass
class Site:
    """All the parts, and the address that clients know."""

    url: str
    replicas: list[Replica]
    postgres: Postgres
    database_url: str
    s3: S3Service
    bucket: str
    network: TcpProxy  # to the bucket

    def busiest(self) -> Replica:
        """The server that carries most jobs out, as soon as one has several."""
        names = {replica.name(): replica for replica in self.replicas}
        held = "SELECT count(*) FROM jobs WHERE state = 'accepted' AND replica = '{}'"
        jobs: dict[str, int] = {}

        def have_several() -> bool:
            jobs.update({name: self.query(held.format(name)) for name in names})
            return max(jobs.values()) >= 2

        assert within(LIMIT, have_several), "no server ever had two jobs at a time"
        return names[max(jobs, key=jobs.__getitem__)]

    def wait_settled(self) -> None:
        """Until nothing of what was accepted is under way: no job, and no work of a server that had lost its own."""
        unfinished = "SELECT count(*) FROM jobs WHERE state = 'accepted'"
        assert within(
            LIMIT, lambda: self.query(unfinished) == 0 and all(replica.is_idle() for replica in self.replicas)
        )

    def query(self, statement: str) -> Any:
        with psycopg.connect(self.database_url) as connection:
            row = connection.execute(statement).fetchone()
        return row and row[0]


class Stores(Protocol):
    """Where a site's jobs and images are."""

    s3: S3Service
    bucket: str

    def query(self, statement: str) -> Any: ...


def count_work(site: Stores) -> tuple[int, int, int]:
    """Jobs, stored images, and how often a job was taken over."""
    jobs, retries = site.query("SELECT count(*) FROM jobs"), site.query("SELECT coalesce(sum(attempt), 0) FROM jobs")
    images = [key for key in site.s3.keys(site.bucket) if key.startswith("images/") and not key.startswith(PROBE)]
    return int(jobs), len(images), int(retries)


@contextmanager
def running_site(folder: Path, count: int) -> Iterator[Site]:
    with ExitStack() as stack:
        postgres, s3 = stack.enter_context(running_postgres()), stack.enter_context(running_s3())
        network = stack.enter_context(proxy_to(s3.port))
        database_url, bucket = postgres.create_database(), s3.create_bucket()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SRPO_")}
        env = clean | {
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "SRPO_API_KEYS": ",".join(KEYS),
            "SRPO_DATABASE_URL": database_url,
            "SRPO_STORE_URL": bucket,
            "SRPO_STORE_ENDPOINT": f"http://127.0.0.1:{network.port}",
            "SRPO_LEASE": str(LEASE),
            "SRPO_FORWARDED_ALLOW_IPS": "127.0.0.1",
        }
        replicas = [Replica(folder / f"replica-{number}", env) for number in range(count)]
        url = stack.enter_context(running_nginx([replica.port for replica in replicas]))
        for replica in replicas:
            replica._env["SRPO_PUBLIC_URL"] = url
            replica.start()
            stack.callback(replica.stop)
        for replica in replicas:
            replica.wait_ready()
        yield Site(url, replicas, postgres, database_url, s3, bucket, network)


@contextmanager
def running_pair(folder: Path) -> Iterator[LiveServer]:
    """Two servers as `srpo serve` starts them, as one for tests. Its log and data folder are the first one's."""
    with running_postgres() as postgres, running_s3() as s3:
        shared: dict[str, Any] = {"database_url": postgres.create_database(), "store_url": s3.create_bucket()}
        options = shared | {"store_endpoint": s3.endpoint}
        with (
            running(folder / "first", **options) as first,
            running(folder / "second", **options) as second,
            running_nginx([first.port, second.port]) as url,
        ):
            yield LiveServer(url, httpx.URL(url).port or 80, first.process, first.log, first.data_dir)


class Client:
    """Sends a request until it is answered, with the same idempotency key, as a good client does."""

    def __init__(self, url: str, gives_up: float = GIVES_UP, passing: Collection[int] = PASSING) -> None:
        """`passing`: statuses that the client tries again after."""
        self._http = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=PATIENCE, follow_redirects=True
        )
        self._gives_up = gives_up
        self._passing = passing
        self.job: str | None = None  # where one was acknowledged

    def draw(self, case: str, seed: int) -> bytes:
        """The image's file. Every second seed asks for a job, every fourth for the bytes in the reply."""
        headers = {"idempotency-key": f"{case} {seed}"}
        body = (
            BODY | {"seed": seed} | ({"response_format": "b64_json", "output_format": "png"} if seed % 4 == 0 else {})
        )
        if seed % 2:
            reply = self._insist("POST", PATH, json=body, headers=headers | PREFER)
            assert reply.status_code == 202, reply.text
            identity = self.job = reply.json()["id"]
            reply = self._insist("GET", f"/v1/jobs/{identity}", until=lambda job: job.json()["status"] in ENDED)
            assert reply.json()["status"] == "succeeded", reply.text
            done = reply.json()["reply"]
        else:
            reply = self._insist("POST", PATH, json=body, headers=headers)
            assert reply.status_code == 201, reply.text
            done = reply.json()
        (item,) = done["images"]
        if "b64_json" in item:
            return str(item["b64_json"]).encode()
        return self._insist("GET", item["url"]).raise_for_status().content

    def _insist(
        self, method: str, path: str, until: Callable[[httpx.Response], bool] = lambda _: True, **options: Any
    ) -> httpx.Response:
        deadline = time.monotonic() + self._gives_up
        while True:
            reply = None
            try:
                reply = self._http.request(method, path, **options)
                if reply.status_code not in self._passing and (not reply.is_success or until(reply)):
                    return reply
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"{method} {path}: {reply.text if reply else 'no reply'}"
            time.sleep(0.1)


ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class Load:
    """Requests of seeds 1 to `count`, from several clients at a time, each posted by two of them."""

    case: str
    url: str
    count: int
    passing: Collection[int] = PASSING
    gives_up: float = GIVES_UP
    digests: dict[int, set[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    acknowledged: set[str] = field(default_factory=set)
    ended: dict[int, float] = field(default_factory=dict)  # when, on the monotonic clock
    begun: dict[int, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        seeds = [seed for seed in range(1, self.count + 1) for _ in range(2)]
        with ThreadPoolExecutor(24) as threads:
            list(threads.map(self._draw, seeds))

    def run_through(self, fault: Callable[[], None]) -> float:
        """Run, and let something fail once an eighth has been answered. Returns when that was over."""
        loading = threading.Thread(target=self.run)
        loading.start()
        assert within(LIMIT, lambda: len(self.ended) >= self.count // 8)
        fault()
        over = time.monotonic()
        loading.join()
        return over

    def judge(self, jobs: int, expected: dict[int, set[str]], over: float) -> dict[str, object]:
        """A row: what became of the requests, of which the server made so many jobs.

        `expected` are the digests of each seed's file, filled by the first row. Recovery counts from `over` on, to the
        last answer of those who waited then.
        """
        if not expected:
            expected |= self.digests
        waiting = [self.ended[seed] - over for seed, begun in self.begun.items() if begun < over and seed in self.ended]
        return {
            "case": self.case,
            "offered": self.count,
            "accepted": jobs,
            "finished": len(self.digests),
            "lost": self.count - len(self.digests),
            "duplicated": jobs - self.count,
            "wrong": sum(
                digests != expected.get(seed, digests) or len(digests) > 1 for seed, digests in self.digests.items()
            ),
            "recovery": f"{max([0.0, *waiting]):.1f} s",
        }

    def list_troubles(self, row: Mapping[str, object]) -> list[str]:
        """What is wrong with a row."""
        return [f"{name} {row[name]}" for name in ("lost", "duplicated", "wrong") if row[name]] + self.failures

    def _draw(self, seed: int) -> None:
        client = Client(self.url, self.gives_up, self.passing)
        self.begun.setdefault(seed, time.monotonic())
        try:
            digest = hashlib.sha256(client.draw(self.case, seed)).hexdigest()
        except (AssertionError, httpx.HTTPError) as error:
            self.failures.append(f"{seed}: {error}")
        else:
            with self._lock:
                self.digests.setdefault(seed, set()).add(digest)
                self.ended[seed] = time.monotonic()
        if client.job:
            self.acknowledged.add(client.job)


class Stored(Protocol):
    """Servers or a cluster over one Postgres and one bucket."""

    @property
    def postgres(self) -> Postgres: ...

    @property
    def network(self) -> TcpProxy: ...


def kill_database(site: Stored) -> None:
    site.postgres.kill()
    time.sleep(5)
    site.postgres.start()


def refuse_bucket(site: Stored) -> None:
    site.network.cut()
    time.sleep(20)
    site.network.mode = "pass"
