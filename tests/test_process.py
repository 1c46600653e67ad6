"""The whole server as a process: same bytes under load and after a crash, nothing lost, nothing left behind."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.jobs import PREFER, call
from support.scripted_process import ScriptedProcess, scripted_process
from support.server import START_LIMIT, LiveServer, running
from support.waiting import LIMIT, within


def png(server: LiveServer, **fields: object) -> bytes:
    fields = {"output_format": "png", "acceleration": "none", "num_inference_steps": 4} | fields
    reply = server.generate(**fields)
    assert reply.status_code == 201, reply.text
    return httpx.get(reply.json()["images"][0]["url"]).content


def worker_pid(server: LiveServer | ScriptedProcess) -> int:
    pid: int = httpx.get(f"{server.url}/health").json()["worker_pids"][0]
    return pid


def in_flight(server: LiveServer) -> int:
    health = httpx.get(f"{server.url}/health").json()
    count: int = health["running"] + health["waiting"]
    return count


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with running(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture
def server(shared: LiveServer) -> LiveServer:
    """One server for the tests that kill its worker or stop it; it is started again for the next of them."""
    if shared.process.poll() is not None:
        shared.start_again()
        shared.wait_ready()
    return shared


@pytest.mark.long
def test_same_seed_same_bytes_alone_in_company_and_after_a_worker_restart(server: LiveServer) -> None:
    alone = png(server, seed=11)
    with concurrent.futures.ThreadPoolExecutor(9) as threads:
        sizes = ["square", "portrait_16_9", {"width": 544, "height": 512}]
        company = [
            threads.submit(server.generate, seed=seed, num_inference_steps=seed, image_size=sizes[seed % 3])
            for seed in range(1, 9)
        ]
        in_company = threads.submit(png, server, seed=11)
        assert in_company.result() == alone
        assert [reply.result().status_code for reply in company] == [201] * 8
    before = worker_pid(server)
    os.kill(before, signal.SIGKILL)
    assert png(server, seed=11) == alone
    assert worker_pid(server) != before
    assert png(server, seed=12) != alone


def test_a_worker_killed_in_the_middle_of_a_request_loses_nothing(server: LiveServer) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        replies = [threads.submit(png, server, seed=seed, num_inference_steps=16) for seed in range(1, 5)]
        assert within(LIMIT, lambda: httpx.get(f"{server.url}/health").json()["running"] > 0)
        os.kill(worker_pid(server), signal.SIGKILL)
        pictures = [reply.result() for reply in replies]
    assert pictures == [png(server, seed=seed, num_inference_steps=16) for seed in range(1, 5)]
    assert re.search(r"worker_died(.*\n)*.*worker_ready", server.log.read_text())


@pytest.mark.long
def test_without_a_terminal_every_line_is_json_through_a_crash_and_a_restart(serve: Callable[..., LiveServer]) -> None:
    server = serve()
    assert server.generate().status_code == 201
    before = worker_pid(server)
    os.kill(before, signal.SIGKILL)
    assert server.generate().status_code == 201
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(LIMIT) == 0
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all({"event", "level", "timestamp"} <= set(entry) for entry in entries)
    assert any("Try it:" in entry["event"] for entry in entries)  # the banner too
    assert entries[-1]["event"] == "Stopped."
    assert [entry["pid"] for entry in entries if entry["event"] == "worker_died"] == [before]
    assert [entry["device"] for entry in entries if entry["event"] == "worker_ready"] == ["auto"]


def test_sigkill_of_the_server_takes_the_worker_along(tmp_path: Path) -> None:
    """In the middle of a step that does not end."""
    with scripted_process(tmp_path / "data") as server, concurrent.futures.ThreadPoolExecutor(1) as threads:
        pid = worker_pid(server)
        body = {"model": "flux/srpo", "prompt": "hang"}
        threads.submit(httpx.post, f"{server.url}/v1/images/generations", json=body, timeout=LIMIT)
        assert within(LIMIT, lambda: httpx.get(f"{server.url}/health").json()["running"] > 0)
        server.process.kill()
        assert within(LIMIT, lambda: not alive(pid))


def test_sigterm_finishes_what_was_accepted_and_exits_cleanly(server: LiveServer) -> None:
    pid = worker_pid(server)
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        replies = [threads.submit(server.generate, num_inference_steps=50) for _ in range(6)]
        assert within(LIMIT, lambda: in_flight(server) == 6)
        server.process.send_signal(signal.SIGTERM)
        assert [reply.result().status_code for reply in replies] == [201] * 6
    assert server.process.wait(LIMIT) == 0
    assert within(LIMIT, lambda: not alive(pid))
    assert re.search(r"Stopping: \d requests? in flight may take 60 s more \.\.\.\n(.*\n)*Stopped\.\n", server.shown())


STOPPED_EARLY = """
import os, signal, sys
from server.cli import serve
show_start = serve.banner.show_start
def stop_and_show(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    show_start(*arguments)
serve.banner.show_start = stop_and_show
sys.exit(serve.main(sys.argv[1:]))
"""


def test_sigterm_counts_before_the_server_listens_too(serve: Callable[..., LiveServer]) -> None:
    """It was forgotten, and whoever sent it waited until its patience ended."""
    server = serve(wait=False, wrap=lambda python, _m, _server, _serve, *flags: [python, "-c", STOPPED_EARLY, *flags])
    assert server.process.wait(LIMIT) == 0
    assert server.shown().endswith("Stopped.\n")


@pytest.mark.long
def test_sigterm_lets_a_job_that_is_drawn_end_though_nobody_waits(serve: Callable[..., LiveServer]) -> None:
    """Those that wait are left to the next server."""
    server = serve(max_running="1", shutdown_grace=f"{LIMIT:.0f}")
    body = {"model": "flux/srpo", "prompt": "x", "num_inference_steps": 50, "image_size": "square_hd"}
    drawn, *waiting = [
        call(server, "POST", "/v1/images/generations", json=body, headers=PREFER).json()["id"] for _ in range(3)
    ]
    assert within(LIMIT, lambda: call(server, "GET", f"/v1/jobs/{drawn}").json()["status"] == "running")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(LIMIT) == 0
    with contextlib.closing(sqlite3.connect(server.data_dir / "jobs.sqlite3")) as database:
        states = dict(database.execute("SELECT id, state FROM jobs"))
    assert states == {drawn: "succeeded"} | dict.fromkeys(waiting, "accepted")


@pytest.mark.long
def test_work_for_a_client_that_went_away_is_dropped(serve: Callable[..., LiveServer]) -> None:
    server = serve(max_running="1")
    body = {"model": "flux/srpo", "prompt": "x", "num_inference_steps": 50, "num_images": 4, "image_size": "square_hd"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=httpx.Timeout(LIMIT, read=1.0))
    assert within(LIMIT, lambda: in_flight(server) == 0)
    assert server.generate().status_code == 201
    assert within(LIMIT, lambda: '"status": 499' in server.log.read_text())


@pytest.mark.long
def test_not_ready_says_how_far_it_is_until_it_is(serve: Callable[..., LiveServer]) -> None:
    server = serve(wait=False)
    assert within(LIMIT, lambda: answers(server.url))
    ready = httpx.get(f"{server.url}/ready")
    refused = server.generate()
    assert (ready.status_code, refused.status_code) == (503, 503)
    assert set(ready.json()) == {"ready", "state", "stage", "progress", "eta_seconds"}
    assert refused.json()["error"]["code"] == "not_ready"
    assert {"stage", "progress", "eta_seconds"} <= set(refused.json())
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.wait_ready()
    assert server.generate().status_code == 201


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_that_is_taken_is_said_at_once(live: LiveServer, serve: Callable[..., LiveServer]) -> None:
    second = serve("--port", str(live.port), wait=False)
    assert second.process.wait(LIMIT) == 2
    lines = second.log.read_text().splitlines()
    (failure,) = [entry for entry in map(json.loads, lines) if entry["level"] == "error"]
    assert failure["event"] == "start_failed"
    assert "Address already in use. Choose another port with --port" in failure["reason"]


def test_a_data_folder_has_one_server_at_a_time(live: LiveServer, serve: Callable[..., LiveServer]) -> None:
    """Two would both carry out its unfinished jobs, and clean up after each other."""
    half_written = live.data_dir / "images" / "ab" / "abcdef.partial"
    half_written.parent.mkdir(exist_ok=True)
    half_written.touch()
    second = serve("--data-dir", str(live.data_dir), wait=False)
    assert second.process.wait(START_LIMIT) == 2
    assert f"another server (pid {live.process.pid}) uses the data folder" in second.log.read_text()
    assert half_written.exists()
    half_written.unlink()
    assert live.generate().status_code == 201


@pytest.mark.long
def test_weights_that_cannot_be_loaded_end_the_server_with_the_reason(
    tmp_path: Path, serve: Callable[..., LiveServer]
) -> None:
    (tmp_path / "models" / "SRPO").mkdir(parents=True)
    (tmp_path / "models" / "SRPO" / "diffusion_pytorch_model.safetensors").touch()
    server = serve(wait=False, log_format="json", model="flux/srpo", models_dir=str(tmp_path / "models"))
    assert server.process.wait(START_LIMIT) == 78
    assert "flux/srpo is not complete" in server.shown()
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    (failure,) = [entry for entry in entries if entry["event"] == "load_failed"]
    assert "model_index.json" in failure["exception"]


@pytest.mark.long
def test_two_devices_serve_the_same_bytes_and_one_at_a_time_may_die(serve: Callable[..., LiveServer]) -> None:
    server = serve(devices="cpu,cpu")

    def workers() -> list[dict[str, object]]:
        listed: list[dict[str, object]] = httpx.get(f"{server.url}/health").json()["workers"]
        return listed

    assert within(START_LIMIT, lambda: [worker["state"] for worker in workers()] == ["ready", "ready"])
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        replies = [threads.submit(png, server, seed=5, num_inference_steps=30) for _ in range(6)]
        assert within(LIMIT, lambda: all(worker["running"] for worker in workers()))
        os.kill(int(str(workers()[0]["pid"])), signal.SIGKILL)
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert len({reply.result() for reply in replies}) == 1
    assert within(START_LIMIT, lambda: [worker["restarts"] for worker in workers()] == [1, 0])
