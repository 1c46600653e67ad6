"""Workers that stop without dying, that cannot be started, or that die again and again: real processes and signals."""

import asyncio
import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.pools import pool_of, result_of, until
from support.scripted import ask, picture

from pipelines.errors import WorkersSuspended
from pipelines.workers import patience as patience_module
from pipelines.workers.activity import ActivityReport
from pipelines.workers.patience import FACTOR, Heartbeat, Patience, Restarts
from pipelines.workers.pool import WorkerPool

LIMIT = 60.0  # seconds for what nobody's verdict depends on
starting = partial(pool_of, wait=False)
QUICK = Patience(silence=4.0, floor=LIMIT)  # a busy machine is silent for a second


@pytest.fixture(autouse=True)
def _scripted_engine_for_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


async def ready(pool: WorkerPool) -> int:
    """Waits; returns the worker's process id."""
    await until(lambda: pool.status().state == "ready")
    return pool.status().worker_pids[0]


async def replaced(pool: WorkerPool, pid: int) -> None:
    await until(lambda: pool.status().state != "ready")
    assert await ready(pool) != pid
    assert pool.status().restarts == 1


async def test_an_idle_worker_that_stops_is_replaced_before_anybody_asks() -> None:
    async with starting(patience=QUICK) as pool:
        pid = await ready(pool)
        os.kill(pid, signal.SIGSTOP)
        await replaced(pool, pid)
        assert await result_of(pool.submit(ask())) == (picture(7),)


async def test_a_worker_that_stops_while_loading_is_replaced(tmp_path: Path) -> None:
    async with starting("waiting", tmp_path, patience=QUICK) as pool:
        await until((tmp_path / "begun").exists)
        pid = pool.status().worker_pids[0]
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: pool.status().restarts == 1)
        (tmp_path / "go").touch()
        assert await ready(pool) != pid


def test_silence_counts_a_tenth_while_a_worker_works() -> None:
    """Importing a large library from a slow disk keeps Python's lock: no thread of the worker can answer."""
    for works, least in ((True, 0.1), (False, 1.0)):
        heartbeat = Heartbeat()
        heartbeat.pinged -= 1
        heartbeat.tick(1.0, works)
        assert least <= heartbeat.silent <= 2 * least


async def test_a_worker_that_starts_works_and_one_that_is_stopped_does_not() -> None:
    async with starting() as pool:
        process = pool.supervisors[0]._process  # type: ignore[attr-defined]
        await until(process.has_worked)
        pid = await ready(pool)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: not process.has_worked())
        assert not process.has_worked()


async def test_a_worker_that_stops_in_a_step_is_replaced_although_its_clients_leave() -> None:
    """Each new request used to set the clock back, and each client that left to stop it."""
    async with starting(patience=QUICK) as pool:
        pid = await ready(pool)
        job = pool.submit(ask("slow", 10_000))
        await until(lambda: job.remaining_fraction < 1)
        os.kill(pid, signal.SIGSTOP)
        pool.cancel(job)
        while pool.status().restarts == 0:
            impatient = pool.submit(ask())
            await asyncio.sleep(0.05)
            pool.cancel(impatient)
        assert await result_of(pool.submit(ask())) == (picture(7),)
        assert await ready(pool) != pid


async def test_a_step_that_hangs_is_noticed_although_its_client_has_left() -> None:
    async with starting(patience=Patience(silence=LIMIT, floor=2.0)) as pool:
        pid = await ready(pool)
        await result_of(pool.submit(ask()))  # a pace is measured
        job = pool.submit(ask("hang"))
        await until(lambda: (latest := job.channel.latest()) is not None and latest.stage == "text")
        pool.cancel(job)
        await replaced(pool, pid)


async def test_a_worker_that_goes_on_is_not_replaced() -> None:
    async with starting(patience=QUICK) as pool:
        pid = await ready(pool)
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(QUICK.silence / 4)
        os.kill(pid, signal.SIGCONT)
        assert await result_of(pool.submit(ask())) == (picture(7),)
        assert (pool.status().restarts, pool.status().worker_pids) == (0, (pid,))


def test_slow_steps_are_no_hang_once_they_were_measured() -> None:
    patience = Patience(floor=120)
    step = ActivityReport("denoise", 2.0, 0.0, {})
    assert patience.budget(step, {}) == 120 * FACTOR * 2
    assert patience.budget(step, {"denoise": 1.0}) == 120
    assert patience.budget(step, {"denoise": 300.0}) == FACTOR * 600


async def test_a_worker_that_cannot_be_spawned_is_tried_again() -> None:
    """Where no descriptor is free: the failure used to be lost, and nobody served ever after."""
    async with starting(patience=Patience(retry=0.1)) as pool:
        pid = await ready(pool)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pool.status().restarts == 1 and "no worker process" in (pool.status().failure or ""))
            assert pool.status().state == "restarting"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await result_of(pool.submit(ask())) == (picture(7),)


async def test_a_worker_whose_message_cannot_be_handled_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with starting() as pool:
        pid = await ready(pool)
        handle, failures = pool.on_job_event, iter([RuntimeError("a bug")])

        def fail_once(*arguments: Any) -> None:
            for failure in failures:
                raise failure
            handle(*arguments)

        monkeypatch.setattr(pool, "on_job_event", fail_once)
        with capture_logs() as entries:
            assert await result_of(pool.submit(ask())) == (picture(7),)
        assert pool.status().worker_pids != (pid,)
        assert "worker_message_failed" in [entry["event"] for entry in entries]


async def test_kills_from_outside_fail_no_job() -> None:
    async with starting() as pool:
        await ready(pool)
        jobs = [pool.submit(ask("slow", steps=8, seed=seed)) for seed in range(1, 9)]
        for death in range(1, 4):
            await until(lambda: any(job.remaining_fraction < 1 for job in jobs))
            os.kill(await ready(pool), signal.SIGKILL)
            await until(lambda death=death: pool.status().restarts == death)  # type: ignore[misc]
        assert [await result_of(job) for job in jobs] == [(picture(seed),) for seed in range(1, 9)]


async def test_after_many_deaths_new_work_is_refused_until_a_worker_is_ready(tmp_path: Path) -> None:
    patience = Patience(max_deaths=2, retry=0.1)
    async with starting("dying", tmp_path, patience=patience) as pool:
        await ready(pool)
        (tmp_path / "die").touch()
        job = pool.submit(ask(f"die-once {tmp_path / 'marker'}"))
        await until(lambda: pool.status().state == "suspended")
        with pytest.raises(WorkersSuspended) as refused:
            pool.submit(ask())
        assert refused.value.retry_after >= 0
        assert "have died in a row" in (pool.status().failure or "")
        (tmp_path / "die").unlink()
        assert await result_of(job) == (picture(7),)
        assert await result_of(pool.submit(ask())) == (picture(7),)
        assert pool.status().failure is None


def test_the_circuit_counts_recent_deaths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(patience_module.time, "monotonic", lambda: now)
    restarts = Restarts(Patience(max_deaths=3, window=100, retry=60))
    assert [restarts.count_death() for _ in range(3)] == [0, 1, 60]
    assert restarts.open
    now += 101
    assert not restarts.open
    assert restarts.count_death() != 60
    restarts.count_death(), restarts.count_death()
    assert restarts.open
    restarts.forgive()
    assert not restarts.open
