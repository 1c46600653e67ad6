"""How a job ended is written down in the end, whatever the disk and other programs do meanwhile."""

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError
from support.buckets import S3Service
from support.instant import served
from support.jobs import PREFER, call, ended, events_of
from support.ledgers import disks_permitted, fill, locked, small_disk
from support.scripted_server import Gate, Scripted
from support.server import START_LIMIT, free_port, wait_ready
from support.tcp_proxy import proxy_to
from support.waiting import within

from server.images.stores.local import LocalStore
from server.jobs.store import JobStore

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


def is_ready(server: Any) -> bool:
    return httpx.get(f"{server.url}/ready").status_code == 200


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
        assert within(START_LIMIT, lambda: is_ready(server))
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


def test_a_job_whose_row_is_deleted_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work went on for ever, and so did the waiting for it."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    gate = Gate(tmp_path / "gate")
    with Scripted(tmp_path / "data") as server, ThreadPoolExecutor(2) as clients:
        identity = accept(server, prompt=gate.prompt)
        watcher = clients.submit(call, server, "GET", f"/v1/jobs/{identity}/events")
        Scripted.until(lambda: gate.begun == 1)
        with closing(sqlite3.connect(tmp_path / "data" / "jobs.sqlite3")) as other, other:
            other.execute("DELETE FROM jobs")
        canceller = clients.submit(call, server, "DELETE", f"/v1/jobs/{identity}")
        assert canceller.result(START_LIMIT).status_code == 410
        assert events_of(watcher.result(START_LIMIT))[-1][1] == "error"
        assert call(server, "GET", f"/v1/jobs/{identity}").status_code == 404
        gate.allow(3)
        assert within(START_LIMIT, lambda: server.in_flight == 0)
        assert within(START_LIMIT, lambda: is_ready(server))


def failing_ends(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool]) -> None:
    """Let the database say something of which we know no more than that it is an error."""
    end = JobStore.end

    def fail(store: JobStore, identity: str, state: str, *rest: Any, **options: Any) -> bool:
        if fails(state):
            raise OperationalError("UPDATE jobs", None, Exception("nobody knows"))
        return end(store, identity, state, *rest, **options)

    monkeypatch.setattr(JobStore, "end", fail)


def test_an_error_that_nobody_knows_is_tried_again_and_in_the_end_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("server.jobs.runner.FIRST_PAUSE", 0.0)
    told: list[str] = []

    def first(state: str) -> bool:
        told.append(state)
        return len(told) == 1

    with Scripted(tmp_path) as server:
        with monkeypatch.context() as once:
            failing_ends(once, first)
            assert ended(server, accept(server, prompt="quick"))["status"] == "succeeded"
        failing_ends(monkeypatch, lambda state: state == "succeeded")
        failed = ended(server, accept(server, prompt="quick", seed=8))
        assert (failed["status"], failed["error"]["error"]["code"]) == ("failed", "internal_error")
        assert "UPDATE" not in json.dumps(failed)
        assert within(START_LIMIT, lambda: is_ready(server))
    assert told == ["succeeded", "succeeded"]


# --- images in replies -----------------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {"response_format": "b64_json"},
    {"response_format": "both"},
    {"sync_mode": True},
    {"sync_mode": True, "response_format": "both"},
    {},
]


def stored_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "images").rglob("*") if path.is_file()]


def test_a_reply_is_replayed_byte_for_byte_and_its_images_are_in_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever form it was asked for, by the server that drew it and by the next one."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    words = f"quick srpo-file:{'A' * 32}.png \\u0000 \N{SNOWMAN} \U0001f600"
    asked = [BODY | {"prompt": words, "num_images": 3, "output_format": "png"} | form for form in FORMS]
    texts: list[list[str]] = []  # of each time: of each form
    for _ in range(2):
        with Scripted(tmp_path, safety_checker="none", response_format="url") as server:
            drawn = [call(server, "POST", PATH, json=body).json() for body in asked]
            for _ in range(2):
                keyed = ((body, {"idempotency-key": f"key {number}"}) for number, body in enumerate(asked))
                texts.append([call(server, "POST", PATH, json=body, headers=headers).text for body, headers in keyed])
    for form, plain, *replies in zip(FORMS, drawn, *texts, strict=True):
        assert len(set(replies)) == 1, form
        reply = json.loads(replies[0])
        assert [sorted(item) for item in reply["images"]] == [sorted(item) for item in plain["images"]], form
        for item, wanted in zip(reply["images"], plain["images"], strict=True):
            assert item.get("b64_json") == wanted.get("b64_json"), form
            assert item["url"] == wanted["url"] if item.get("url", "").startswith("data:") else True, form
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as ledger:
        outcomes = [outcome for (outcome,) in ledger.execute("SELECT outcome FROM jobs")]
    assert len(outcomes) == len(FORMS)
    assert not [outcome for outcome in outcomes if "b64_json" in outcome or len(outcome) > 3000]


def test_a_reply_whose_images_have_expired_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Scripted(tmp_path) as server:
        asked = BODY | {"prompt": "quick", "response_format": "b64_json"}
        headers = {"idempotency-key": "key"}
        identity = call(server, "POST", PATH, headers=headers | PREFER, json=asked).json()["id"]
        assert ended(server, identity)["reply"]["images"][0]["b64_json"]
        (file,) = stored_files(tmp_path)
        file.unlink()
        gone = call(server, "POST", PATH, headers=headers, json=asked)
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "expired")
        assert call(server, "GET", f"/v1/jobs/{identity}").status_code == 410
        assert call(server, "GET", "/v1/jobs").json()["data"][0]["status"] == "succeeded"
        ((_, name, error),) = events_of(call(server, "GET", f"/v1/jobs/{identity}/events"))
        assert (name, error["error"]["code"]) == ("error", "expired")


def test_a_job_waits_for_a_store_that_is_away_and_a_plain_request_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Service
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("server.images.stores.s3.PATIENCE", 0.0)
    with proxy_to(s3.port) as network:
        store: dict[str, Any] = {
            "store_url": s3.create_bucket(), "store_endpoint": f"http://127.0.0.1:{network.port}",
        }  # fmt: skip
        with Scripted(tmp_path, **store) as server:
            network.cut()
            identity = accept(server, prompt="quick")
            assert within(START_LIMIT, lambda: "image store cannot be reached" in reason(server))
            refused = call(server, "POST", PATH, json=BODY | {"prompt": "quick"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
            unwanted = accept(server, prompt="quick", seed=8)
            assert call(server, "DELETE", f"/v1/jobs/{unwanted}").json()["status"] == "cancelled"
            network.mode = "pass"
            done = ended(server, identity)
            assert done["status"] == "succeeded"
            path = httpx.URL(done["reply"]["images"][0]["url"]).path
            assert httpx.get(server.url + path).headers["content-type"] == "image/jpeg"
            assert within(START_LIMIT, lambda: is_ready(server))


def test_jobs_that_wait_for_the_store_are_so_many_and_keep_no_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have left the queue, so that it would let in any number while the disk is full."""
    alive: set[object] = set()

    class Pixels(bytes):
        def __init__(self, _: object) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("support.instant.draw_black", lambda _: (16, 16, Pixels(bytes(16 * 16 * 3))))
    body = {"model": "flux/srpo", "prompt": "x", "image_size": "square"}
    with served(tmp_path) as (app, url), httpx.Client(base_url=url, timeout=START_LIMIT) as client:
        app.parts.pool.capacity = 4
        with monkeypatch.context() as disk:
            disk.setattr(LocalStore, "_write", full)
            disk.setattr("server.images.stores.local.write_synced", full)
            posted = []
            for _ in range(12):
                posted.append(client.post("/v1/images/generations", json=body, headers=PREFER))
                assert within(START_LIMIT, lambda: app.parts.store.failure is not None)
            assert [reply.status_code for reply in posted] == [202] * 4 + [503] * 8
            assert posted[-1].json()["error"]["code"] == "storage_full"
            assert int(posted[-1].headers["retry-after"]) >= 1
            assert within(START_LIMIT, lambda: not alive)
        places = [f"/v1/jobs/{reply.json()['id']}" for reply in posted[:4]]
        assert within(START_LIMIT, lambda: {client.get(place).json()["status"] for place in places} == {"succeeded"})
        again = lambda: client.post("/v1/images/generations", json=body, headers=PREFER).status_code  # noqa: E731
        assert within(START_LIMIT, lambda: again() == 202)


@pytest.mark.long
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
        identity = accept(server, prompt="x", num_inference_steps=50)
        filler = fill(Path(f"/proc/{process.pid}/root{folder}"))
        assert within(START_LIMIT, lambda: "disk is full" in reason(server))
        filler.unlink()
        assert ended(server, identity)["status"] in ("succeeded", "failed")
        assert within(START_LIMIT, lambda: is_ready(server))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_LIMIT)
