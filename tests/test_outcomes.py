"""How a job ended is written down in the end, whatever the disk and other programs do meanwhile."""

import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.jobs import PREFER, call, ended
from support.ledgers import disks_permitted, fill, locked, small_disk
from support.scripted_server import Gate, Scripted
from support.server import START_LIMIT, free_port, wait_ready
from support.waiting import within

PATH = "/v1/images/generations"
BODY: dict[str, Any] = {"model": "flux/srpo", "image_size": "square", "num_inference_steps": 3, "seed": 7}


class Address:
    def __init__(self, url: str) -> None:
        self.url = url


def accept(server: Any, **fields: Any) -> str:
    reply = call(server, "POST", PATH, headers=PREFER, json=BODY | fields)
    assert reply.status_code == 202, reply.text
    identity: str = reply.json()["id"]
    return identity


def reason(server: Any) -> str:
    """Why the server is not ready."""
    reply = httpx.get(f"{server.url}/ready")
    text: str = reply.json().get("reason", "") if reply.status_code == 503 else ""
    return text


def test_an_outcome_is_written_when_the_database_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("server.database.sqlite.BUSY_TIMEOUT", 0.01)
    gate = Gate(tmp_path / "gate")
    with Scripted(tmp_path / "data") as server:
        identity = accept(server, prompt=gate.prompt)
        with locked(tmp_path / "data" / "jobs.sqlite3"):
            gate.allow(3)
            assert within(START_LIMIT, lambda: "outcomes of 1 requests" in reason(server))
            assert "locked by another program" in httpx.get(f"{server.url}/health").json()["trouble"]
        assert ended(server, identity)["status"] == "succeeded"
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert gate.begun == 3  # drawn once


def test_a_server_that_stops_before_leaves_the_job_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("server.database.sqlite.BUSY_TIMEOUT", 0.01)
    gate = Gate(tmp_path / "gate")
    with ExitStack() as lock, Scripted(tmp_path / "data") as server:
        identity = accept(server, prompt=gate.prompt)
        lock.enter_context(locked(tmp_path / "data" / "jobs.sqlite3"))
        gate.allow(6)
        assert within(START_LIMIT, lambda: bool(reason(server)))
    with Scripted(tmp_path / "data") as server:
        assert ended(server, identity)["status"] == "succeeded"


def test_an_outcome_is_written_when_the_disk_has_room_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if not disks_permitted(folder):
        pytest.skip("no file systems of one's own here: the full disk is not tried")
    port, log = free_port(), tmp_path / "server.log"
    flags = ("--port", str(port), "--data-dir", str(folder), "--model", "tiny")
    command = small_disk(folder, "8m", sys.executable, "-m", "server", "serve", *flags)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    server = Address(f"http://127.0.0.1:{port}")
    try:
        wait_ready(server.url, process, log)
        identity = accept(server, prompt="x", num_inference_steps=20)
        filler = fill(Path(f"/proc/{process.pid}/root{folder}"))
        assert within(START_LIMIT, lambda: "disk is full" in reason(server))
        filler.unlink()
        assert ended(server, identity)["status"] in ("succeeded", "failed")
        assert httpx.get(f"{server.url}/ready").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_LIMIT)
