"""A real `srpo serve` process on a real loopback port."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import httpx2
from support.waiting import LIMIT

PROMPT = "A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses."

# Each new client, also that of one `httpx.get`, reads the certificates of all authorities: 25 ms, thousands of times.
for library in (httpx, httpx2):
    library._transports.default.create_ssl_context = cache(library.create_ssl_context)
    # Who names no timeout has 5 s, which a machine with other work may need for any reply. It is changed in place:
    # the functions' defaults are this very object.
    vars(library._config.DEFAULT_TIMEOUT_CONFIG).update(vars(library.Timeout(LIMIT)))

Process = subprocess.Popen[bytes] | subprocess.Popen[str]
START_LIMIT = float(os.environ.get("START_LIMIT", "300"))  # seconds; a busy machine imports torch slowly


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class LiveServer:
    """A running server process."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    data_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)  # the process's own, to start it again

    def start_again(self) -> None:
        """Another process in the place of one that has ended: same command, port, data folder and log."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.process.args, env=self.env, stdout=out, stderr=subprocess.STDOUT)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=START_LIMIT, **options)

    def generate(self, **fields: Any) -> httpx.Response:
        """POST a small fast request; fields are added to it or take the place of its own."""
        body = {"model": "flux/srpo", "prompt": PROMPT, "image_size": "square", "num_inference_steps": 1} | fields
        with self.client() as client:
            return client.post("/v1/images/generations", json=body)

    def shown(self) -> str:
        """The log in words, as somebody reads it: of a line of JSON its event."""
        return "".join(f"{read_event(line)}\n" for line in self.log.read_text().splitlines())

    def settled_log(self) -> str:
        """The log with a line for every reply read so far.

        A reply can be read before its line is written, so a last request, of a path of its own, is waited for.
        """
        last = f"/asked-last/{uuid.uuid4()}"
        httpx.get(f"{self.url}{last}", headers={"authorization": "Bearer none"}, timeout=START_LIMIT)
        deadline = time.monotonic() + START_LIMIT
        while last not in (text := self.log.read_text().rpartition("\n")[0]):
            assert time.monotonic() < deadline, f"no line for {last}:\n{text}"
            time.sleep(0.01)
        return text

    def wait_ready(self) -> None:
        wait_ready(self.url, self.process, self.log)


def read_event(line: str) -> str:
    try:
        entry = json.loads(line)
        return str(entry["reason" if entry["event"] == "start_failed" else "event"])
    except (ValueError, TypeError, KeyError):
        return line


class ServerNotReady(AssertionError):
    """The server ended before it was ready, or took too long. Says so in its log's words."""


def wait_ready(url: str, process: Process, log: Path, limit: float = START_LIMIT) -> None:
    """Wait until the server at `url` would draw a request now. Raises `ServerNotReady`, after `limit` seconds too."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerNotReady(f"the server ended:\n{log.read_text()}")
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise ServerNotReady(f"{log.read_text()}\nnot ready after {limit:.0f} s")


@contextmanager
def running(
    folder: Path,
    *flags: str,
    wait: bool = True,
    cwd: Path | None = None,
    wrap: Callable[..., list[str]] = lambda *command: [*command],
    **env: str,
) -> Iterator[LiveServer]:
    """`srpo serve` in `cwd` with `flags` and SRPO_* variables `env`, stopped at the end, or an `AssertionError`.

    `wrap` makes of the words of its command those of another one, which becomes the server by `exec`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "server.log"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SRPO_")}
    variables["SRPO_MODEL"] = "tiny"
    variables |= {f"SRPO_{name.upper()}": value for name, value in env.items()}
    command = [sys.executable, "-m", "server", "serve", "--port", str(port), "--data-dir", str(folder / "data"), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(wrap(*command), env=variables, stdout=out, stderr=subprocess.STDOUT, cwd=cwd)
    server = LiveServer(f"http://127.0.0.1:{port}", port, process, log, folder / "data", variables)
    try:
        if wait:
            server.wait_ready()
        yield server
    finally:
        stop(server)


def stop(server: LiveServer) -> None:
    """End the process, if it has not ended. Raises `AssertionError` with its log where a signal to stop does not."""
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()
    else:
        return
    raise AssertionError(f"the server has not stopped within {LIMIT:g} s:\n{server.log.read_text()}")
