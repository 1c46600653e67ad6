"""A folder that looks like a checkout after `make serve`, in which the commands of a page run."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.pages import ROOT
from support.server import free_port, wait_ready

ADDRESS = "http://127.0.0.1:8000"  # the server's, on the pages
SERVES = re.compile(r"^(\w+=\S+ )*(srpo serve|make serve)\b")
BIN = Path(sys.executable).parent
METRICS_PORT = "9464"  # on the pages
MAY_BE_MISSING = ("node", "openssl")


def run(command: list[str], folder: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stdout}{ended.stderr}"
    return ended


class Checkout:
    """A folder that looks like a checkout after `make serve`, and the server that its commands talk to."""

    def __init__(self, folder: Path, url: str, env: Mapping[str, str]) -> None:
        for entry in ROOT.iterdir():
            if entry.name not in ("data", "models", "bench-gpu", ".git", ".venv"):
                (folder / entry.name).symlink_to(entry)
        (folder / ".venv").symlink_to(BIN.parent)
        (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
        self.folder, self.url, self.metrics_port = folder, url, str(free_port())
        self.servers: list[subprocess.Popen[bytes]] = []
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SRPO_", "HF_", "MAKE"))}
        self.env = clean | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "SRPO_DEVICES": "cpu",  # the pages are for a machine with a GPU, where nobody has to name one
            "PYTHONPATH": str(ROOT),
            "CURL_HOME": str(folder),
            "SRPO_PORT": str(free_port()),
            "SRPO_URL": url,
            **env,
        }

    def run(self, command: str) -> None:
        """Carry out one command, as it stands on the page but for the server's address."""
        command = command.replace(METRICS_PORT, self.metrics_port)
        tool = shlex.split(command)[0]
        if tool in MAY_BE_MISSING and shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
        if SERVES.match(command):
            self.serve(command)
        else:
            run(["bash", "-o", "pipefail", "-c", command.replace(ADDRESS, self.url)], self.folder, self.env)

    def serve(self, command: str) -> None:
        """Start a server on a free port, in the place of the one before, and wait until it is ready."""
        self.stop()
        port = str(free_port())
        command = command.replace("make serve", "make --assume-old=.venv/.serve serve").replace("9000", port)
        self.url = f"http://127.0.0.1:{port}"
        self.env["SRPO_URL"] = self.url
        log = self.folder / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.env | {"SRPO_PORT": port},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.servers.append(process)
        wait_ready(self.url, process, log)

    def stop(self) -> None:
        while self.servers:
            process = self.servers.pop()
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
