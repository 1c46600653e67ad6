"""Workers that sleep: the device is free, the next request wakes them and waits, and nothing else changes."""

import asyncio
import gc
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from support.command_line import srpo
from support.jobs import PREFER, ended, events_of
from support.pictures import Peer
from support.pools import pool_of, result_of, until
from support.receivers import Receiver
from support.scripted import ask, picture
from support.scripted_process import scripted_process
from support.scripted_server import Gate, Scripted
from support.server import LiveServer, running
from support.waiting import LIMIT, within

from pipelines.errors import WorkersBusy
from pipelines.job import Progress
from pipelines.workers.idleness import IdleRelease
from pipelines.workers.pool import WorkerPool
from server.cli.sleep import sleep
from server.database.sqlite import FILE

PATH = "/v1/images/generations"
BODY = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 2, "seed": 7}
CYCLES = int(os.environ.get("SLEEPS", "20"))
SLACK = 2**24  # bytes that an allocator may keep
starting = partial(pool_of, wait=False)


@pytest.fixture(autouse=True)
def _scripted_engine_for_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


async def state(pool: WorkerPool, wanted: str) -> None:
    await until(lambda: pool.status().state == wanted)


async def loaded(pool: WorkerPool) -> None:
    """Once a worker has been ready; it may sleep by now."""
    await until(lambda: pool.status().info is not None)


async def stages(job: Any) -> list[Progress]:
    return [event async for event in job.events() if isinstance(event, Progress)]


# ---- In the pool


async def test_an_idle_worker_ends_and_the_next_request_waits_for_another() -> None:
    async with starting(idle_release=0.2) as pool:
        await loaded(pool)
        await state(pool, "asleep")
        await until(lambda: pool.status().worker_pids == ())
        assert pool.estimate_wait() > 0
        job = pool.submit(ask())
        assert pool.status().state == "waking"
        told = asyncio.ensure_future(stages(job))
        assert await result_of(job) == (picture(7),)
        waited = [event for event in await told if event.stage == "waking"]
        assert waited
        assert all(event.eta > 0 and event.position == 0 for event in waited)
        assert pool.status().restarts == 0
        await state(pool, "asleep")


async def test_work_keeps_a_worker_awake() -> None:
    """Each job takes far longer than a worker may be idle."""
    async with starting(idle_release=0.05) as pool:
        await loaded(pool)
        jobs = [pool.submit(ask("slow", 30)) for _ in range(2)]
        for job in jobs:
            told = await stages(job)
            assert [event.step for event in told if event.stage == "denoise"] == [*range(1, 31)]
        assert pool.status().restarts == 0


async def test_a_worker_is_never_put_to_sleep_by_hand_while_there_are_jobs() -> None:
    async with starting() as pool:
        await state(pool, "ready")
        job = pool.submit(ask("slow", 20))
        with pytest.raises(WorkersBusy):
            pool.idleness.sleep()
        assert await result_of(job) == (picture(7),)
        pool.idleness.sleep()
        assert pool.status().state == "asleep"
        pool.idleness.sleep()  # again: nothing to do
        pool.idleness.wake()
        pool.idleness.wake()
        await state(pool, "ready")


async def test_a_request_that_comes_before_the_old_worker_is_reaped_gets_a_new_one() -> None:
    async with starting() as pool:
        for _ in range(3):
            await state(pool, "ready")
            pool.idleness.sleep()
            assert await result_of(pool.submit(ask())) == (picture(7),)
        assert pool.status().restarts == 0


async def test_a_worker_that_dies_while_it_wakes_is_followed_by_another(tmp_path: Path) -> None:
    """As where a neighbour has taken the memory: the request waits in the queue."""
    async with starting("dying", tmp_path) as pool:
        await state(pool, "ready")
        pool.idleness.sleep()
        (tmp_path / "die").touch()
        job = pool.submit(ask())
        await until(lambda: pool.status().restarts == 1)
        assert pool.status().state == "restarting"
        (tmp_path / "die").unlink()
        assert await result_of(job) == (picture(7),)


async def test_a_request_that_is_cancelled_leaves_the_worker_to_wake() -> None:
    async with starting() as pool:
        await state(pool, "ready")
        pool.idleness.sleep()
        pool.cancel(pool.submit(ask()))
        await state(pool, "ready")


async def test_all_devices_sleep_and_wake() -> None:
    async with starting(devices=("cpu", "cpu")) as pool:
        await until(lambda: [worker.state for worker in pool.status().workers] == ["ready", "ready"])
        pool.idleness.sleep()
        assert [worker.state for worker in pool.status().workers] == ["asleep", "asleep"]
        assert await result_of(pool.submit(ask())) == (picture(7),)
        await until(lambda: [worker.state for worker in pool.status().workers] == ["ready", "ready"])


async def test_a_pool_that_sleeps_stops() -> None:
    async with starting(idle_release=0.05) as pool:
        await loaded(pool)
        await state(pool, "asleep")


class Supervisor:
    """A device for the clock's own test."""

    device = "none"

    def __init__(self) -> None:
        self.state = "ready"

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    def sleep(self) -> None:
        self.state = "asleep"

    def wake(self) -> None:
        self.state = "waking"


def test_the_time_begins_with_the_last_request_or_the_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipelines.workers.idleness.time.monotonic", lambda: now[0])
    device: Any = Supervisor()
    has_jobs = [False]
    idleness = IdleRelease([device], 100.0, lambda: has_jobs[0])

    def after(seconds: float, *, busy: bool = False) -> str:
        now[0] += seconds
        has_jobs[0] = busy
        idleness.look()
        return str(device.state)

    device.state = "loading"
    assert after(500) == "loading"
    device.state = "ready"
    assert [after(60), after(39), after(1)] == ["ready", "ready", "asleep"]
    idleness.wake()
    assert [after(1), after(300)] == ["waking", "waking"]
    device.state = "ready"
    assert [after(90), after(90, busy=True), after(99), after(1)] == ["ready", "ready", "ready", "asleep"]


# ---- Over HTTP


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Scripted]:
    with Scripted(tmp_path / "data") as server:
        yield server


def test_a_server_that_sleeps_is_ready_and_says_so(scripted: Scripted) -> None:
    def ready() -> dict[str, Any]:
        reply = httpx.get(f"{scripted.url}/ready")
        assert reply.status_code == 200
        body: dict[str, Any] = reply.json()
        return body

    awake = httpx.post(scripted.url + PATH, json=BODY, timeout=LIMIT).json()
    assert httpx.post(f"{scripted.url}/v1/admin/sleep").json()["state"] == "asleep"
    assert ready()["state"] == ready()["stage"] == "asleep"
    assert ready()["eta_seconds"] >= 1
    assert within(LIMIT, lambda: httpx.get(f"{scripted.url}/health").json()["worker_pids"] == [])  # it takes a moment
    assert httpx.get(f"{scripted.url}/health").json()["state"] == "asleep"
    assert 'srpo_pool_state{state="asleep"} 1.0' in httpx.get(f"{scripted.url}/metrics").text
    events_asked = {"accept": "text/event-stream"}
    streamed = httpx.post(scripted.url + PATH, json=BODY | {"stream": True}, headers=events_asked, timeout=LIMIT)
    events = [(name, data) for _, name, data in events_of(streamed)]
    assert next(data["stage"] for name, data in events if name.endswith("progress")) == "waking"
    assert events[-1][0] == "image_generation.completed"
    assert ready()["state"] == "ready"
    again = httpx.post(scripted.url + PATH, json=BODY, timeout=LIMIT).json()
    pictures = [httpx.get(reply["data"][0]["url"]).content for reply in (awake, again)]
    assert pictures[0] == pictures[1]
    assert httpx.post(f"{scripted.url}/v1/admin/wake").json()["state"] == "ready"
    assert "/v1/admin/sleep" not in httpx.get(f"{scripted.url}/openapi.json").json()["paths"]


def test_a_durable_job_wakes_the_worker_and_work_forbids_to_sleep(scripted: Scripted, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    httpx.post(f"{scripted.url}/v1/admin/sleep")
    job = httpx.post(scripted.url + PATH, json=BODY | {"prompt": gate.prompt}, headers=PREFER).json()["id"]
    refused = httpx.post(f"{scripted.url}/v1/admin/sleep")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "workers_busy")
    gate.allow(100)
    assert ended(scripted, job)["status"] == "succeeded"


def test_only_who_has_an_operators_key_may_do_it(live_with_key: LiveServer) -> None:
    url, headers = f"{live_with_key.url}/v1/admin/sleep", {"authorization": "Bearer secret-key-1"}
    assert httpx.post(url).status_code == 401
    refused = httpx.post(url, headers=headers)
    assert (refused.status_code, refused.json()["error"]["name"]) == (403, "ScopeMissing")


def descriptors(process: psutil.Process) -> int:
    """How many files, sockets and pipes it holds open, without those of the database's pool of connections."""
    of_database = sum(Path(file.path).name.startswith(FILE) for file in process.open_files())
    return int(process.num_fds()) - of_database


def test_a_key_for_this_machine_goes_through_no_proxy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = b'HTTP/1.1 200 OK\r\ncontent-length: 18\r\n\r\n{"state":"asleep"}'
    server, proxy = Peer("127.0.0.1", reply), Peer("127.0.0.1", reply)
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    assert sleep(["--port", str(urlsplit(server.url).port), "--key", "a-key"]) == 0
    assert b"Bearer a-key" in server.heard
    assert proxy.connections == 0
    assert sleep(["--url", "http://srpo.example"]) == 0  # another machine, that perhaps only the proxy can reach
    assert proxy.connections == 1
    assert capsys.readouterr().out == "asleep\n" * 2


def test_the_commands(tmp_path: Path) -> None:
    with scripted_process(tmp_path / "data") as scripted:
        slept = srpo("sleep", "--url", scripted.url)
        assert (slept.returncode, slept.stdout) == (0, "asleep\n"), slept.stderr
        woken = srpo("wake", SRPO_PORT=str(urlsplit(scripted.url).port))
        assert (woken.returncode, woken.stdout) == (0, "ready\n"), woken.stderr
    lost = srpo("sleep", "--url", "http://127.0.0.1:9")
    assert lost.returncode == 2
    assert "no server answers" in lost.stderr
    with Receiver() as other:  # a server, but another one
        mistaken = srpo("sleep", "--url", f"http://{other.place}")
    assert mistaken.returncode == 2
    assert "--url" in mistaken.stderr


# ---- The real engine, again and again


@pytest.mark.operate
def test_cycles_leave_nothing_behind_and_change_no_byte(tmp_path: Path) -> None:
    with running(tmp_path, "--idle-release", "1h") as server:
        first = server.generate(seed=7, output_format="png", response_format="b64_json").json()["data"][0]["b64_json"]
        process = psutil.Process(server.process.pid)
        sizes, held, seconds = [], [], []
        for _ in range(CYCLES + 2):  # the first ones fill caches
            worker = psutil.Process(httpx.get(f"{server.url}/health", timeout=LIMIT).json()["worker_pids"][0])
            held.append(worker.memory_info().rss)
            assert srpo("sleep", "--url", server.url).stdout == "asleep\n"
            assert within(LIMIT, lambda one=worker: not one.is_running())  # type: ignore[misc]
            assert within(LIMIT, lambda: process.children(recursive=True) == [])
            begun = time.monotonic()
            again = server.generate(seed=7, output_format="png", response_format="b64_json").json()
            seconds.append(time.monotonic() - begun)
            assert again["data"][0]["b64_json"] == first
            gc.collect()
            sizes.append((process.memory_info().rss, descriptors(process), process.num_threads()))
        assert sizes[-1][0] < sizes[1][0] + SLACK, sizes
        assert within(LIMIT, lambda: descriptors(process) <= sizes[1][1]), sizes  # the last client's sockets close soon
        assert sizes[-1][2] <= sizes[1][2] + 4, sizes  # pools of threads grow up to their size
        print(
            f"{len(seconds)} cycles: the worker held {max(held) / 2**20:.0f} MiB, the first request after a sleep took "
            f"{min(seconds):.1f} to {max(seconds):.1f} s, the server {sizes[1][0] / 2**20:.0f} MiB, then "
            f"{sizes[-1][0] / 2**20:.0f}"
        )
