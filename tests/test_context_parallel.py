"""One image on two devices: two processes on the CPU (gloo) against one, on the tiny model."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from multiprocessing import Pipe
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from structlog.testing import capture_logs
from support.engines import ask, draw, tiny_engine

from pipelines.child_process import DEVICE_LOST
from pipelines.engine.base import EngineConfig, Report
from pipelines.job import Job
from pipelines.loading.context_parallel import JoinGroup, NotTogether, follow, load_group, validate_group
from pipelines.loading.placement import get_placement
from pipelines.request import ImageRequest
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.settings.engine import EngineSettings
from weights import tiny
from weights.checkpoints import CHECKPOINTS

REQUESTS = [
    ask(512, 512, 4, seed=3),
    ask(544, 672, 10, seed=4, acceleration="high", guidance_scale=2.0),
    ask(512, 512, 9, seed=5, acceleration="regular", num_images=2),
]


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WorkerPool]:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    config = EngineConfig("tiny", dtype="float32", tuning_cache=str(tmp_path / "engine.json"))
    pool = WorkerPool(local_workers(config, ("cpu+cpu",)))
    await pool.start()
    yield pool
    await pool.stop()


def pictures(data: tuple[bytes, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8).int()


def processes(leader: int) -> list[int]:
    """The processes that Python's multiprocessing has started for the worker."""
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.long
async def test_two_devices_draw_what_one_draws(pool: WorkerPool, tmp_path: Path) -> None:
    """Within rounding, for every preset, interleaved, after a neighbour was dropped, and again after a death."""
    async with asyncio.timeout(300):
        while pool.status().state != "ready":
            assert not pool.failed.is_set(), pool.status().failure
            await asyncio.sleep(0.05)
    info = pool.status().info
    assert info is not None
    assert info.device.endswith("2 together")
    dropped = pool.submit(ask(512, 544, 50, seed=9, acceleration="high"))
    jobs = [pool.submit(request) for request in REQUESTS]
    pool.cancel(dropped)
    drawn = [await finished(job) for job in jobs]
    engine = tiny_engine(torch.float32)
    for request, data in zip(REQUESTS, drawn, strict=True):
        difference = (pictures(data) - pictures(tuple(draw(engine, request)))).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.001
    (follower,) = processes(pool.status().worker_pids[0])
    jobs = [pool.submit(request) for request in REQUESTS]
    os.kill(follower, signal.SIGKILL)
    assert [await finished(job) for job in jobs] == drawn
    assert pool.status().restarts == 1
    assert not list((tmp_path / "temporary").iterdir())


async def finished(job: Job) -> tuple[bytes, ...]:
    async with asyncio.timeout(300):
        return (await job.result()).pixels


def load_but_on_the_second(config: EngineConfig, report: Report, join_group: JoinGroup) -> NoReturn:
    if config.device != "cpu":
        raise RuntimeError("no such device")
    join_group(tiny.build().transformer, tiny.TEXT_TOKENS, get_placement(CHECKPOINTS["tiny"], "float32", "auto"))
    raise AssertionError("the second has joined")


@pytest.mark.long
def test_what_fails_on_another_device_is_told() -> None:
    with pytest.raises(NotTogether, match=r"^other: RuntimeError: no such device$"):
        load_group(EngineConfig("tiny", device="cpu+other"), lambda *_: None, load_but_on_the_second)


class QuotingEngine:
    """An engine whose errors quote the prompt."""

    def prepare(self, request: ImageRequest) -> list[int]:
        raise RuntimeError(f"no such token in {request.prompt!r}")


def test_an_error_on_another_device_is_logged_without_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    here, there = Pipe()
    here.send(("prepare", 0, ask(prompt="a zebra in pyjamas")))
    with capture_logs() as lines, pytest.raises(SystemExit) as ended:
        follow(there, QuotingEngine())  # type: ignore[arg-type]
    assert ended.value.code == DEVICE_LOST
    [line] = lines
    assert "RuntimeError" in line["exception"]
    assert "zebra" not in line["exception"]


def test_what_cannot_be_shared_is_refused() -> None:
    transformer, whole = tiny.build().transformer, get_placement(CHECKPOINTS["tiny"], "float32", "auto")
    validate_group(transformer, 64, whole, 2)
    for count in (3, 4):
        with pytest.raises(NotTogether, match=r"take 2 or 4 \(it has 2 heads\)"):
            validate_group(transformer, 64, whole, count)
    with pytest.raises(NotTogether, match="the whole model on each"):
        validate_group(transformer, 64, get_placement(CHECKPOINTS["tiny"], "float32", "offload"), 2)


@pytest.mark.parametrize("devices", ["cuda:0+cuda:1", "cuda:0+cuda:1,cuda:2+cuda:3", "cpu+cpu", "auto"])
def test_devices_are_joined_by_a_plus(devices: str) -> None:
    assert EngineSettings(devices=devices).devices == tuple(devices.split(","))


@pytest.mark.parametrize("devices", ["", "cuda:0+cpu", "cuda+cuda", "gpu", "cuda:0+", "auto+auto"])
def test_what_is_no_device_is_refused(devices: str) -> None:
    with pytest.raises(ValueError, match="devices like"):
        EngineSettings(devices=devices)
