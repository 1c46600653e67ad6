"""The most memory that each stage takes at the largest size, and what running out of it says in CUDA's own words."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.gpu.setup import NEEDS_CUDA, Results, Setup
from bench.support.comparison import Comparison, make_request
from bench.support.memory import GIB, PeakMemory
from pipelines.engine.failures import classify_failure
from pipelines.request import ImageRequest, Source

JOBS = 16
ROOM = (0.05, 0.4, 1.0, 2.0)  # GiB beside what is held already: each makes another kernel the one that fails
SECOND = 2.0  # of these, what later requests must fit into


def measure(setup: Setup) -> Results:
    comparison = setup.compare()
    side = 512 if setup.rehearse else 1536
    request = make_request(side, side, setup.steps, "high")
    for name, work in list_work(comparison, request).items():
        yield f"{name} {side}x{side}, GiB above the weights", measure_peak(comparison, work)
    if setup.rehearse:
        yield "out of memory", NEEDS_CUDA
        return
    for room in ROOM:
        for name, message in exhaust(comparison, request, room).items():
            yield f"{name} with {room} GiB", message
    yield "after out of memory", draw_again(comparison)


def list_work(comparison: Comparison, request: ImageRequest) -> dict[str, Callable[[], object]]:
    """What to measure, in order; each work uses what the one before has made."""
    engine = comparison.engine
    source = Source(bytes(3 * request.width * request.height), 0.8)
    samples: list[Any] = []

    def step() -> None:
        for _ in range(4):
            engine.step(samples)

    def some_jobs() -> list[Any]:
        jobs = [engine.prepare(replace(request, seeds=(seed,))) for seed in range(JOBS)]
        for job in jobs:
            engine.step(job)
            engine.step(job)
        return jobs

    return {
        "text": lambda: samples.extend(engine.prepare(request)),
        "steps": step,
        "decode": lambda: engine.finish(samples[0]),
        "a picture to begin with": lambda: engine.prepare(replace(request, source=source)),
        f"{JOBS} jobs": some_jobs,
    }


def measure_peak(comparison: Comparison, work: Callable[[], object]) -> float | str:
    """GiB that the work takes at most, beside what was held before it."""
    cuda = comparison.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(comparison.device) / GIB if cuda else PeakMemory(comparison.device).gib()
    peak = PeakMemory(comparison.device)
    try:
        work()
    except RuntimeError as error:
        return describe_error(error, comparison.device)
    comparison.synchronize()
    reserved = torch.cuda.max_memory_reserved(comparison.device) / GIB if cuda else 0.0
    return max(peak.gib(), reserved) - before


def exhaust(comparison: Comparison, request: ImageRequest, room: float) -> dict[str, str]:
    """What each work says when only `room` GiB are left: the errors that `pipelines.engine.failures` must know."""
    device, said = comparison.device, dict[str, str]()
    total = torch.cuda.get_device_properties(device).total_memory
    for name, work in list_work(comparison, request).items():
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved(device)
        if name in ("steps", "text"):
            work()  # the others need its samples
            continue
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + room * GIB) / total), device)
        try:
            work()
            said[name] = "it fits"
        except RuntimeError as error:
            said[name] = describe_error(error, device)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    return said


def describe_error(error: Exception, device: torch.device) -> str:
    """Class, first lines, and what the engine makes of it."""
    words = " / ".join(str(error).splitlines()[:2])
    return f"{type(error).__name__}: {words} -> {classify_failure(error, device) or 'the device is lost'}"


def draw_again(comparison: Comparison) -> str:
    """Whether the engine still draws after all that."""
    comparison.run_engine(make_request(512, 512, 4, "none"))
    return "draws"
