"""A real `srpo serve` for the measurements that go over HTTP."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

GENERATIONS = "/v1/images/generations"
READY = 300  # seconds that a server may take to become ready
LAST_LINES = 30  # of its log, in an error


@contextmanager
def start_server(model: str = "tiny", *flags: str, log: Path | None = None) -> Iterator[str]:
    """Serve `model` on a free port with an empty data folder; yields the URL once the server is ready.

    What it logs goes to the file `log`. Raises `RuntimeError` with the end of it where the server ends instead, or is
    not ready after `READY` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "server", "serve"]
        command += ["--port", str(port), "--data-dir", folder, "--model", model, *flags]
        log = log or Path(folder) / "server.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stderr=file, env=os.environ | {"SRPO_QUEUE_SIZE": "1000"})
        deadline = time.monotonic() + READY
        try:
            while not is_ready(url):
                if process.poll() is not None:
                    raise RuntimeError(f"the server has ended with {process.returncode}:\n{read_end(log)}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the server is not ready after {READY} s:\n{read_end(log)}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


def read_end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def worker_pids(url: str) -> list[int]:
    pids: list[int] = httpx.get(f"{url}/health").json()["worker_pids"]
    return pids


def api_pid(url: str) -> int:
    """The API process: the parent of the server's first worker."""
    return int(Path(f"/proc/{worker_pids(url)[0]}/stat").read_text().rpartition(")")[2].split()[1])
