"""The pool against a real child process that dies, hangs, fails and is cancelled on request."""

import asyncio
import os
import signal
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.pools import pool_of, result_of, until
from support.scripted import ask, picture

from pipelines.engine.base import EngineConfig
from pipelines.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    NotReady,
    OutOfMemory,
    QueueFull,
    WorkerCrashed,
)
from pipelines.job import EVENT_CAPACITY, Event, Preview, PreviewPlan, Progress
from pipelines.workers.patience import Patience
from pipelines.workers.pool import WorkerPool
from pipelines.workers.visible_devices import isolate_devices
from pipelines.workers.worker import configure_libraries

LIMIT = 30.0  # seconds; nothing here takes one on an idle machine
SLOW = 10_000  # steps that nobody waits for: 50 ms each


@pytest.fixture(autouse=True)
def _scripted_engine_for_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def progress(event: Event) -> Progress:
    assert isinstance(event, Progress)
    return event


async def test_draws_every_image_in_order_and_reports_every_step() -> None:
    async with pool_of() as pool:
        job = pool.submit(ask(num_images=3, steps=4))
        events = [event async for event in job.events() if isinstance(event, Progress)]
        steps = [(event.image, event.step) for event in events if event.stage == "denoise"]
        assert await result_of(job) == (picture(7), picture(8), picture(9))
        assert steps == [(image, step) for image in range(3) for step in range(1, 5)]


async def test_refuses_while_loading_with_the_stage() -> None:
    async with pool_of(wait=False) as pool:
        with pytest.raises(NotReady) as refused:
            pool.submit(ask())
        assert refused.value.retry_after >= 1
        await until(lambda: pool.status().state == "ready")
        await result_of(pool.submit(ask()))


async def test_a_full_queue_refuses_before_any_work() -> None:
    async with pool_of(queue_size=2, max_running=1) as pool:
        jobs = [pool.submit(ask("slow", SLOW)) for _ in range(3)]
        with pytest.raises(QueueFull) as refused:
            pool.submit(ask())
        assert refused.value.waiting == 2
        assert refused.value.retry_after > pool.estimate_wait()
        pool.cancel(jobs[1])
        pool.submit(ask())  # a place is free again


async def test_running_jobs_take_turns() -> None:
    """A short job that arrives second ends long before the long one."""
    async with pool_of(max_running=2) as pool:
        long, short = pool.submit(ask("slow", SLOW)), pool.submit(ask())
        await result_of(short)
        assert not long.finished


async def test_a_cancelled_job_stops_within_a_step_and_frees_the_worker() -> None:
    async with pool_of(max_running=1) as pool:
        job = pool.submit(ask("slow", SLOW))
        await until(lambda: pool.status().running == 1)
        waiting = pool.submit(ask())
        pool.cancel(job)
        with pytest.raises(Cancelled):
            await result_of(job)
        await result_of(waiting)


@pytest.mark.parametrize("running", [True, False])
async def test_a_deadline_ends_a_job_running_or_waiting(running: bool) -> None:
    async with pool_of(max_running=1, request_timeout=0.5) as pool:
        first = pool.submit(ask("slow", SLOW))
        job = first if running else pool.submit(ask("slow", SLOW))
        with pytest.raises(DeadlineExceeded):
            await result_of(job)
        with suppress(DeadlineExceeded):
            await result_of(first)
        pool._request_timeout = LIMIT  # that of the next
        await result_of(pool.submit(ask()))


@pytest.mark.parametrize(("prompt", "error"), [("raise", GenerationFailed), ("oom", OutOfMemory)])
async def test_a_failing_job_fails_alone(prompt: str, error: type[Exception]) -> None:
    async with pool_of() as pool:
        bad, good = pool.submit(ask(prompt)), pool.submit(ask(steps=20))
        with pytest.raises(error):
            await result_of(bad)
        await result_of(good)
        assert pool.status().restarts == 0


async def test_a_killed_worker_loses_nothing() -> None:
    async with pool_of() as pool:
        jobs = [pool.submit(ask("slow", steps=5, seed=index)) for index in range(1, 9)]
        await until(lambda: pool.status().running > 0)
        await anext(jobs[0].events())
        os.kill(pool.status().worker_pids[0], signal.SIGKILL)
        assert [await result_of(job) for job in jobs] == [(picture(index),) for index in range(1, 9)]
        assert pool.status().restarts == 1


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_segments_can_grow_unless_the_operator_says_otherwise(name: str) -> None:
    untouched: dict[str, str] = {}
    configure_libraries(untouched)
    assert "expandable_segments:True" in untouched["PYTORCH_ALLOC_CONF"].split(",")
    own = {name: "max_split_size_mb:128"}
    configure_libraries(own)
    assert {key: value for key, value in own.items() if key.startswith("PYTORCH")} == {name: "max_split_size_mb:128"}


async def test_what_auto_meant_at_the_first_start_it_means_at_every_start(tmp_path: Path) -> None:
    (tmp_path / "auto").write_text("cuda")
    (tmp_path / "card").write_text("H200")
    async with pool_of(model="placed", models_dir=tmp_path) as pool:
        (tmp_path / "auto").write_text("cpu")  # the driver is gone
        os.kill(pool.status().worker_pids[0], signal.SIGKILL)
        await until(lambda: pool.status().restarts == 1 and pool.status().state == "ready")
        info = pool.status().info
        assert info is not None
        assert info.device == "cuda, H200"


async def test_a_worker_that_comes_back_on_another_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "auto").write_text("cuda")
    (tmp_path / "card").write_text("H200")
    async with pool_of(model="placed", models_dir=tmp_path) as pool:
        (tmp_path / "card").write_text("RTX")
        unfinished = pool.submit(ask("slow", SLOW))
        await until(lambda: pool.status().running == 1)
        os.kill(pool.status().worker_pids[0], signal.SIGKILL)
        await until(pool.failed.is_set)
        failure = pool.status().failure
        assert failure == "the device has changed from cuda, H200 to cuda, RTX: start the server again"
        with pytest.raises(Draining):  # for the server after this one, which waits for the last request
            await result_of(unfinished)
        with pytest.raises(NotReady):
            pool.submit(ask())


@pytest.mark.parametrize("prompt", ["die", "lose"])
async def test_a_job_that_kills_its_worker_twice_fails_alone(prompt: str) -> None:
    async with pool_of() as pool:
        poison = pool.submit(ask(prompt))
        jobs = [pool.submit(ask("slow", steps=3, seed=index)) for index in range(1, 5)]
        with pytest.raises(WorkerCrashed):
            await result_of(poison)
        assert [await result_of(job) for job in jobs] == [(picture(index),) for index in range(1, 5)]
        assert pool.status().restarts == 2


async def test_a_job_that_kills_its_worker_once_is_drawn_in_the_end(tmp_path: Path) -> None:
    async with pool_of() as pool:
        job = pool.submit(ask(f"die-once {tmp_path / 'marker'}"))
        assert await result_of(job) == (picture(7),)


async def test_a_hanging_step_is_noticed_and_its_worker_replaced() -> None:
    async with pool_of(patience=Patience(silence=LIMIT, floor=2.0)) as pool:
        await result_of(pool.submit(ask()))  # a pace is measured
        job = pool.submit(ask("hang"))
        with pytest.raises(WorkerCrashed):
            await result_of(job)
        await result_of(pool.submit(ask()))


async def test_a_start_that_breaks_the_device_is_followed_by_another(tmp_path: Path) -> None:
    async with pool_of(model="breaking", models_dir=tmp_path) as pool:
        assert pool.status().state == "ready"
        assert pool.status().restarts == 1


async def test_an_engine_that_cannot_load_says_why_and_is_not_tried_for_ever() -> None:
    async with pool_of(wait=False, model="broken") as pool:
        async with asyncio.timeout(LIMIT):
            await pool.failed.wait()
        status = pool.status()
        assert status.state == "failed"
        assert status.failure == "FileNotFoundError: weights.safetensors is missing"
        assert status.restarts == 0


async def test_a_draining_pool_takes_nothing_new_and_finishes_what_it_has() -> None:
    async with pool_of() as pool:
        job = pool.submit(ask("slow", steps=5))
        pool.drain()
        with pytest.raises(Draining):
            pool.submit(ask())
        await result_of(job)


async def test_stopping_answers_what_is_unfinished() -> None:
    async with pool_of(max_running=1) as pool:
        jobs = [pool.submit(ask("slow", SLOW)) for _ in range(3)]
    for job in jobs:
        with pytest.raises(Draining):
            await result_of(job)


async def test_a_waiting_job_learns_its_position_in_the_queue() -> None:
    async with pool_of(max_running=1) as pool:
        running = pool.submit(ask("slow", SLOW))
        first, second = pool.submit(ask()), pool.submit(ask())
        heard = second.events()
        assert progress(await anext(heard)).position == 1
        pool.cancel(first)
        told = progress(await anext(heard))
        assert (told.stage, told.position) == ("queued", 0)
        assert told.eta > 0
        pool.cancel(running)
        stages = [progress(event).stage async for event in heard]
        assert stages == ["text", "denoise", "denoise", "decode"]


async def test_previews_come_evenly_and_never_after_the_last_step() -> None:
    async with pool_of() as pool:
        job = pool.submit(ask(steps=9, num_images=2), PreviewPlan(2, 8))
        events = [event async for event in job.events()]
        where = []
        for before, event in pairwise(events):
            if isinstance(event, Preview):
                assert len(event.pixels) == event.width * event.height * 3 == 192
                where.append((event.image, event.index, progress(before).step))
        assert where == [(0, 0, 3), (0, 1, 6), (1, 0, 3), (1, 1, 6)]


async def test_a_reader_that_does_not_read_holds_nobody_up_and_misses_the_oldest() -> None:
    async with pool_of() as pool:
        job = pool.submit(ask(steps=EVENT_CAPACITY * 3))
        assert await result_of(job) == (picture(7),)
        late = [event async for event in job.events()]
        assert len(late) == EVENT_CAPACITY
        assert progress(late[-1]).stage == "decode"
        numbers = [number async for number, _ in job.channel.read(after=EVENT_CAPACITY * 3)]
        assert numbers == [EVENT_CAPACITY * 3 + 1, EVENT_CAPACITY * 3 + 2]


# --- several devices --------------------------------------------------------------------------------------------


def states(pool: WorkerPool) -> list[str]:
    return [worker.state for worker in pool.status().workers]


async def test_requests_are_spread_over_the_devices() -> None:
    async with pool_of(devices=("one", "one"), max_running=2) as pool:
        assert states(pool) == ["ready", "ready"]
        jobs = [pool.submit(ask("slow", SLOW)) for _ in range(2)]
        assert [worker.running for worker in pool.status().workers] == [1, 1]
        jobs += [pool.submit(ask("slow", SLOW)) for _ in range(3)]
        assert [worker.running for worker in pool.status().workers] == [2, 2]
        assert pool.status().waiting == 1
        pool.cancel(jobs[1])
        assert [worker.running for worker in pool.status().workers] == [2, 2]


async def test_a_large_job_on_one_device_leaves_the_other_to_the_small_ones() -> None:
    async with pool_of(devices=("one", "one")) as pool:
        large = pool.submit(ask("slow", SLOW))
        for seed in range(1, 5):
            assert await result_of(pool.submit(ask(seed=seed))) == (picture(seed),)
        assert [worker.running for worker in pool.status().workers] == [1, 0]
        assert not large.finished


async def test_when_one_device_dies_the_others_serve_and_nothing_is_lost() -> None:
    async with pool_of(devices=("one", "one")) as pool:
        jobs = [pool.submit(ask("slow", steps=20, seed=seed)) for seed in range(1, 7)]
        dies, lives = pool.status().workers
        assert dies.pid is not None
        os.kill(dies.pid, signal.SIGKILL)
        await until(lambda: pool.status().workers[0].pid != dies.pid)
        assert pool.status().state == "ready"
        assert await result_of(pool.submit(ask(seed=99))) == (picture(99),)
        assert [await result_of(job) for job in jobs] == [(picture(seed),) for seed in range(1, 7)]
        await until(lambda: states(pool) == ["ready", "ready"])
        assert [worker.restarts for worker in pool.status().workers] == [1, 0]
        assert pool.status().workers[1].pid == lives.pid


async def test_a_device_that_does_not_come_up_is_logged_and_the_others_serve() -> None:
    with capture_logs() as entries:
        async with pool_of(devices=("broken", "one")) as pool:
            assert states(pool) == ["failed", "ready"]
            assert await result_of(pool.submit(ask())) == (picture(7),)
            assert pool.status().failure == "broken: RuntimeError: no such device"
            assert not pool.failed.is_set()
    reason = "RuntimeError: no such device"
    assert entries == [{"event": "worker_failed", "device": "broken", "reason": reason, "log_level": "error"}]
    async with pool_of(devices=("broken", "broken"), wait=False) as pool:
        async with asyncio.timeout(LIMIT):
            await pool.failed.wait()
        assert pool.status().state == "failed"


async def test_a_device_that_draws_other_bytes_does_not_serve_beside_the_others() -> None:
    async with pool_of(devices=("one", "two")) as pool:
        await until(lambda: sorted(states(pool)) == ["failed", "ready"])
        assert "draws other bytes than" in (pool.status().failure or "")
        assert [await result_of(pool.submit(ask(seed=seed))) for seed in range(1, 4)] == [
            (picture(seed),) for seed in range(1, 4)
        ]


async def test_a_suspect_runs_alone_on_one_device_while_the_other_works() -> None:
    async with pool_of(devices=("one", "one")) as pool:
        poison = pool.submit(ask("die"))
        jobs = [pool.submit(ask("slow", steps=3, seed=seed)) for seed in range(1, 7)]
        with pytest.raises(WorkerCrashed):
            await result_of(poison)
        assert [await result_of(job) for job in jobs] == [(picture(seed),) for seed in range(1, 7)]


@pytest.mark.parametrize(
    ("device", "visible", "told", "seen"),
    [
        ("cuda:1", None, "cuda", "1"),
        ("cuda:1", "4,6", "cuda", "6"),
        ("cuda:2", "4,6", "cuda", "none"),
        ("cuda:0", "", "cuda", "none"),
        ("cuda", "4,6", "cuda", "4,6"),
        ("cuda:1+cuda:0", "4,6", "cuda:0+cuda:1", "6,4"),
        ("cpu", None, "cpu", None),
        ("auto", "3", "auto", "3"),
    ],
)
def test_a_worker_sees_its_own_device_alone(device: str, visible: str | None, told: str, seen: str | None) -> None:
    environment = {"HOME": "/"} | ({"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {})
    config, changed = isolate_devices(EngineConfig(device=device), environment)
    assert config.device == told
    assert changed == {"HOME": "/"} | ({"CUDA_VISIBLE_DEVICES": seen} if seen else {})
