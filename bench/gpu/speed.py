"""What requests cost with the default optimizations, and with float8: each stage, and from prompt to JPEG."""

import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.setup import REHEARSED, Results, Setup
from bench.support.comparison import Comparison, find_device_wait, make_request
from bench.support.geometry import step_flops
from pipelines.acceleration import PRESETS
from pipelines.optimize.optimizations import select_optimizations
from pipelines.request import ImageRequest
from server.images.encoding import encode
from server.settings.server import Settings

REPEATS = 5
FAILED = "optimizations that fail here"
QUALITY = Settings.model_fields["jpeg_quality"].default


def measure_default(setup: Setup) -> Results:
    yield from measure_engine(setup, setup.compare(), "bf16")


def measure_fp8(setup: Setup) -> Results:
    names = REHEARSED if setup.rehearse else select_optimizations(("default",), "cuda")
    comparison = setup.compare(select_optimizations((*names, "fp8"), setup.device.type))
    if "fp8" in comparison.failed:  # what is left is bfloat16 again
        yield FAILED, comparison.failed
        return
    yield from measure_engine(setup, comparison, "fp8")


def measure_engine(setup: Setup, comparison: Comparison, name: str) -> Results:
    yield FAILED, comparison.failed or "none"
    for width, height in setup.sizes:
        size = f"{width}x{height}"
        request = make_request(width, height, setup.steps, "high")
        comparison.run_engine(request)  # warm-up
        stages = comparison.measure_stages(request)
        for stage, seconds in stages.items():
            yield f"{stage} {size}, ms", None if seconds is None else 1e3 * seconds
        flops = step_flops(comparison.pipeline.transformer.config, comparison.text_tokens, width, height)
        yield f"step {size}, TFLOP/s", flops / stages["step"] / 1e12
        yield f"host's part of a step {size}, ms", 1e3 * measure_host(comparison, request)
        waits = partial(find_device_wait, comparison.engine, request)
        yield f"a step waits {size}", setup.on_cuda(waits) or False
        for preset in PRESETS:
            yield f"{preset} {size} to JPEG, s", statistics.median(draw_files(comparison, width, height, setup, preset))
        yield f"profile {size}", write_profile(setup, comparison, request, f"{name}-{size}")


def measure_host(comparison: Comparison, request: ImageRequest) -> float:
    """Seconds until a computed step is queued, where the device has nothing else to do; the median of five."""
    seconds = []
    samples = comparison.engine.prepare(request)
    for _ in range(REPEATS):
        comparison.synchronize()
        start = time.perf_counter()
        comparison.engine.step(samples)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def draw_files(comparison: Comparison, width: int, height: int, setup: Setup, preset: str) -> Iterator[float]:
    """Seconds from a new prompt to the bytes of a JPEG, a few times; one before them does not count."""
    for repeat in range(2 if setup.rehearse else REPEATS + 1):
        request = make_request(width, height, setup.steps, preset)
        request = ImageRequest.from_json(request.to_json() | {"prompt": f"{request.prompt}, {preset} {repeat}"}, b"")
        start = time.perf_counter()
        (sample,) = comparison.engine.prepare(request)
        while comparison.engine.steps_left(sample):
            comparison.engine.step([sample])
        encode(comparison.engine.finish(sample).data, width, height, "jpeg", QUALITY)
        if repeat:
            yield time.perf_counter() - start


def write_profile(setup: Setup, comparison: Comparison, request: ImageRequest, name: str) -> str:
    """A table of the kernels of one computed step, longest first; returns the file's name."""
    samples = comparison.engine.prepare(request)
    comparison.engine.step(samples)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setup.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        comparison.engine.step(samples)
        comparison.synchronize()
    order = f"self_{setup.device.type}_time_total"
    file = setup.folder / f"profile-{name}.txt"
    file.write_text(profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))
    return file.name
