"""What a forward pass of several samples saves, and what it needs: time and peak memory by size and number."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.optimize.batching import COUNTS

if TYPE_CHECKING:
    from bench.engine import Bench

REPEATS = 3
GIB = 2**30


class Peak:
    """The most memory held since it was made: of a CUDA device, or else of this process (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set

    def gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / GIB


def measure_batches(bench: "Bench", sizes: list[tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """By size and number of samples: seconds of a computed step for each image, and the peak; last, decoding alone.

    None stands for what does not fit the device.
    """
    figures: dict[str, dict[str, Any]] = {}
    for width, height in sizes:
        for count in (1, *COUNTS):
            figures[f"{width}x{height}, {count} together"] = measure_steps(bench, width, height, count)
        sample = bench.prepare(width, height, seed=1)
        peak = Peak(bench.device)
        took = bench.seconds(lambda sample=sample: bench.engine.finish(sample))  # type: ignore[misc]
        figures[f"{width}x{height}, decode"] = {"s_per_image": took, "peak_gib": peak.gib()}
    return figures


@torch.inference_mode()
def measure_steps(bench: "Bench", width: int, height: int, count: int) -> dict[str, Any]:
    samples = [bench.prepare(width, height, seed) for seed in range(1, count + 1)]
    peak = Peak(bench.device)
    try:
        bench.engine.step(samples)  # warm-up
        took = [bench.seconds(lambda: bench.engine.step(samples)) for _ in range(REPEATS)]
    except torch.OutOfMemoryError:
        return {"s_per_image": None, "peak_gib": None}
    return {"s_per_image": statistics.median(took) / count, "peak_gib": peak.gib()}
