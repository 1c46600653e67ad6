"""A cluster of Ray Serve on loopback over a Postgres and a bucket, whose replicas' processes can be killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
from support.buckets import S3Service, running_s3
from support.jobs import KEYS
from support.postgres import Postgres, running_postgres
from support.server import START_LIMIT, free_port
from support.waiting import within

TESTS = Path(__file__).parent.parent
LEASE = 3.0  # seconds
ENGINE_TIMEOUT = 10.0  # seconds: many times as long as a busy machine keeps a living engine silent


@dataclass
class ClusterSite:
    url: str
    process: subprocess.Popen[bytes]
    database_url: str
    s3: S3Service
    bucket: str
    log: Path
    env: dict[str, str]

    def query(self, statement: str) -> Any:
        with psycopg.connect(self.database_url) as connection:
            row = connection.execute(statement).fetchone()
        return row and row[0]

    def replicas(self, deployment: str) -> list[int]:
        """The processes of this cluster's replicas of a deployment."""
        name = f"ray::ServeReplica:srpo:{deployment}"
        return [pid for pid in descendants(self.process.pid) if title(pid).startswith(name)]

    def kill(self, deployment: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to the first replica."""
        pid = self.replicas(deployment)[0]
        os.kill(pid, number)
        return pid

    def wait_ready(self) -> None:
        assert within(2 * START_LIMIT, self._is_ready), self.log.read_text()

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
    folder: Path, stores: tuple[Postgres, S3Service], engines: int, *program: str
) -> Iterator[ClusterSite]:
    """`program` runs the cluster: by default one whose engines do what the prompt says."""
    folder.mkdir(parents=True, exist_ok=True)
    postgres, s3 = stores
    database_url, bucket, port = postgres.create_database(), s3.create_bucket(), free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SRPO_", "RAY_"))}
    env = clean | {
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        "SRPO_API_KEYS": ",".join(KEYS),
        "SRPO_DATABASE_URL": database_url,
        "SRPO_STORE_URL": bucket,
        "SRPO_STORE_ENDPOINT": s3.endpoint,
        "SRPO_LEASE": str(LEASE),
        "SRPO_PORT": str(port),
        "SRPO_DATA_DIR": str(folder / "data"),
        "SRPO_MODEL": "tiny",
        "SRPO_SAFETY_CHECKER": "none",
        "SRPO_MAX_RUNNING": "1",
        "SRPO_ENGINES": str(engines),
        "SRPO_ENGINE_TIMEOUT": str(ENGINE_TIMEOUT),
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *(program or ("support.ray_cluster",))],
            env=env,
            stdout=out,
            stderr=out,
            cwd=folder,
        )
    site = ClusterSite(f"http://127.0.0.1:{port}", process, database_url, s3, bucket, log, env)
    try:
        site.wait_ready()
        yield site
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
