"""A cluster of Ray Serve on loopback over a Postgres and a bucket, whose processes can be killed and started again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
from support.buckets import S3Service, running_s3
from support.jobs import KEYS
from support.postgres import Postgres, running_postgres
from support.server import START_LIMIT, LiveServer, free_port
from support.tcp_proxy import TcpProxy, proxy_to
from support.waiting import LIMIT, within

TESTS = Path(__file__).parent.parent
LEASE = 10.0  # seconds: many times as long as a busy machine keeps a living server from renewing it
ENGINE_TIMEOUT = 10.0  # seconds: many times as long as a busy machine keeps a living engine silent


@dataclass
class ClusterSite:
    url: str
    command: list[str]
    folder: Path
    env: dict[str, str]
    postgres: Postgres
    database_url: str
    s3: S3Service
    bucket: str
    network: TcpProxy  # to the bucket
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=out, stderr=out, cwd=self.folder)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """With all its processes."""
        family = descendants(self.process.pid)
        self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert within(LIMIT, lambda: not any(title(pid) for pid in family)), [title(pid) for pid in family]

    def query(self, statement: str) -> Any:
        with psycopg.connect(self.database_url) as connection:
            row = connection.execute(statement).fetchone()
        return row and row[0]

    def find(self, name: str) -> list[int]:
        """The processes of this cluster whose title begins so."""
        return [pid for pid in descendants(self.process.pid) if title(pid).startswith(name)]

    def replicas(self, deployment: str) -> list[int]:
        return self.find(f"ray::ServeReplica:srpo:{deployment}")

    def kill(self, deployment: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the first replica."""
        pid = self.replicas(deployment)[0]
        os.kill(pid, number)
        return pid

    def wait_ready(self) -> None:
        assert within(2 * START_LIMIT, self._is_ready), self.log.read_text()

    def wait_settled(self) -> None:
        """Until all that was accepted has ended."""
        assert within(LIMIT, lambda: self.query("SELECT count(*) FROM jobs WHERE state = 'accepted'") == 0)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            health = httpx.get(f"{self.url}/health", headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=5).json()
        except (httpx.TransportError, ValueError):
            return False
        return all(worker["state"] == "ready" for worker in health.get("workers", [{"state": ""}]))


def descendants(root: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found, waiting = [], [root]
    while waiting:
        parent = waiting.pop()
        children = [pid for pid, its in parents.items() if its == parent]
        found += children
        waiting += children
    return sorted(found)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def running_stores() -> Iterator[tuple[Postgres, S3Service]]:
    """What clusters keep the truth in; each has a database and a bucket of its own."""
    with running_postgres() as postgres, running_s3() as s3:
        yield postgres, s3


@contextmanager
def running_cluster_site(
    folder: Path, stores: tuple[Postgres, S3Service], engines: int, *program: str, **settings: str
) -> Iterator[ClusterSite]:
    """`program` runs the cluster: by default one whose engines do what the prompt says."""
    command = [sys.executable, "-m", *(program or ("support.ray_cluster",))]
    env = {f"SRPO_{name.upper()}": value for name, value in settings.items()}
    with make_site(folder, stores, command, {"SRPO_ENGINES": str(engines)} | env) as site:
        site.start()
        try:
            site.wait_ready()
            yield site
        finally:
            site.stop()


@contextmanager
def running_cluster(folder: Path) -> Iterator[LiveServer]:
    """`srpo cluster up` with two `Api` replicas, as one server for tests."""
    settings = {
        "apis": "2",
        "engine_gpus": "0",
        "engine_timeout": "60",
        "max_running": "16",
        "safety_checker": "embedded",
    }
    program = ("server", "cluster", "up")
    with running_stores() as stores, running_cluster_site(folder, stores, 1, *program, api_keys="", **settings) as site:
        yield LiveServer(site.url, int(site.env["SRPO_PORT"]), site.process, site.log, folder / "data", site.env)


@contextmanager
def make_site(
    folder: Path, stores: tuple[Postgres, S3Service], command: list[str], changed: Mapping[str, str]
) -> Iterator[ClusterSite]:
    """A cluster that is not started yet, with a database and a bucket of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    postgres, s3 = stores
    database_url, bucket, port = postgres.create_database(), s3.create_bucket(), free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SRPO_", "RAY_"))}
    with proxy_to(s3.port) as network:
        env = {
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "SRPO_API_KEYS": ",".join(KEYS),
            "SRPO_DATABASE_URL": database_url,
            "SRPO_STORE_URL": bucket,
            "SRPO_STORE_ENDPOINT": f"http://127.0.0.1:{network.port}",
            "SRPO_LEASE": str(LEASE),
            "SRPO_PORT": str(port),
            "SRPO_DATA_DIR": str(folder / "data"),
            "SRPO_MODEL": "tiny",
            "SRPO_SAFETY_CHECKER": "none",
            "SRPO_MAX_RUNNING": "1",
            "SRPO_ENGINE_TIMEOUT": str(ENGINE_TIMEOUT),
        }
        url = f"http://127.0.0.1:{port}"
        yield ClusterSite(
            url, command, folder, {**clean, **env, **changed}, postgres, database_url, s3, bucket, network
        )
