"""A cluster of two nodes, started as docs/cluster.md says for several machines. Both are on this one."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.buckets import S3Service
from support.cluster_site import ClusterSite, descendants, make_site, title
from support.postgres import Postgres
from support.server import free_port
from support.waiting import LIMIT, within

from server.cluster.session import RAY, SERVE

BIN = Path(sys.executable).parent
NODE = ("--num-cpus=2", "--num-gpus=1", "--object-store-memory=100000000", "--block")
FACTORY = "factory=support.scripted_engine:load"


@dataclass
class Worker:
    """The node beside the head. Each has one logical GPU."""

    site: ClusterSite
    address: str
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        command = [str(BIN / "ray"), "start", f"--address={self.address}", *NODE]
        with self.site.log.open("ab") as out:
            self.process = subprocess.Popen(command, env=self.site.env, stdout=out, stderr=out, cwd=self.site.folder)

    def kill(self) -> None:
        """All its processes at once, as if the machine were gone."""
        family = [self.process.pid, *descendants(self.process.pid)]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert within(LIMIT, lambda: not any(title(pid) for pid in family))


@contextmanager
def running_nodes(folder: Path, stores: tuple[Postgres, S3Service]) -> Iterator[tuple[ClusterSite, Worker]]:
    """A head and another node, with an engine each."""
    port = free_port()
    head = [str(BIN / "ray"), "start", "--head", f"--port={port}", "--include-dashboard=false", *NODE]
    with make_site(folder, stores, head, {"SRPO_ENGINES": "2"}) as site:
        token = folder / "ray.token"
        token.write_text(secrets.token_hex(32))
        address = f"127.0.0.1:{port}"
        site.env |= RAY | SERVE | {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": address}
        worker = Worker(site, address)
        site.start()
        try:
            assert within(LIMIT, lambda: "Ray runtime started" in site.log.read_text()), site.log.read_text()
            worker.start()
            options = [f"--http-port={site.env['SRPO_PORT']}", "--proxy-location=HeadOnly"]
            serve(site, "start", *options)
            serve(site, "run", "--non-blocking", "--name", "srpo", "server.cluster.application:build", FACTORY)
            site.wait_ready()
            yield site, worker
        finally:
            if worker.process.poll() is None:
                worker.kill()
            site.stop(signal.SIGKILL)


def serve(site: ClusterSite, *arguments: str) -> None:
    ended = subprocess.run(
        [BIN / "serve", *arguments], env=site.env, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
