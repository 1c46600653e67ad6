"""Forward passes of several samples: seconds and peak memory, by size and number of samples."""

import statistics
from typing import Any

import torch

from bench.support.comparison import REPEATS, Comparison
from bench.support.memory import PeakMemory
from pipelines.engine.failures import is_out_of_memory
from pipelines.optimize.batching import COUNTS


def measure_batches(comparison: Comparison, sizes: list[tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """By size and number of samples: seconds of a computed step for each image, and the peak of memory in GiB.

    The last row of each size is decoding alone. The figures are None where the device has too little memory.
    """
    figures: dict[str, dict[str, Any]] = {}
    for width, height in sizes:
        for count in (1, *COUNTS):
            figures[f"{width}x{height}, {count} together"] = measure_steps(comparison, width, height, count)
        sample = comparison.prepare_sample(width, height, seed=1)
        peak = PeakMemory(comparison.device)
        took = comparison.measure_seconds(lambda sample=sample: comparison.engine.finish(sample))  # type: ignore[misc]
        figures[f"{width}x{height}, decode"] = {"s_per_image": took, "peak_gib": peak.gib()}
    return figures


@torch.inference_mode()
def measure_steps(comparison: Comparison, width: int, height: int, count: int) -> dict[str, Any]:
    samples = [comparison.prepare_sample(width, height, seed) for seed in range(1, count + 1)]
    peak = PeakMemory(comparison.device)
    try:
        comparison.engine.step(samples)  # warm-up
        took = [comparison.measure_seconds(lambda: comparison.engine.step(samples)) for _ in range(REPEATS)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"s_per_image": None, "peak_gib": None}
    return {"s_per_image": statistics.median(took) / count, "peak_gib": peak.gib()}
