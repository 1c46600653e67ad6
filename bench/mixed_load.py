"""Latencies of unlike requests, in a burst and as a Poisson stream, with the run queue and first come first served."""

import random
import statistics
import time

from bench.support.comparison import Comparison, Figures, make_request
from pipelines.acceleration import PRESETS
from pipelines.engine.sample import Sample
from pipelines.queueing.cost_model import CostModel
from pipelines.queueing.run_queue import RunQueue
from pipelines.request import ImageRequest, Timings

LOAD = 0.8  # of what the device can do, for the Poisson stream


def measure_mixed_load(comparison: Comparison, requests: int, sizes: list[tuple[int, int]], most_steps: int) -> Figures:
    """Latencies in seconds and images a second, by arrival and order. All four runs draw the same requests."""
    chance = random.Random(5)
    lengths = [max(1, round(most_steps * part)) for part in (0.15, 0.5, 0.5, 1.0)]
    presets = list(PRESETS)
    work = [
        make_request(*chance.choice(sizes), chance.choice(lengths), chance.choice(presets), seed)
        for seed in range(1, requests + 1)
    ]
    cost_model = CostModel()
    for request in work[:8]:
        took = comparison.measure_seconds(lambda request=request: comparison.run_engine(request))  # type: ignore[misc]
        cost_model.record_job(request, Timings(denoise=took))
    gap = statistics.mean(cost_model.estimate_seconds(request) for request in work) / LOAD
    stream = [0.0]
    while len(stream) < requests:
        stream.append(stream[-1] + chance.expovariate(1 / gap))
    figures: Figures = {}
    for shape, arrivals in (("burst", [0.0] * requests), ("poisson", stream)):
        for order in ("scheduler", "first_come"):
            figures[f"{shape}_{order}"] = replay(comparison, work, arrivals, cost_model, in_order=order == "first_come")
    return figures


def replay(
    comparison: Comparison, work: list[ImageRequest], arrivals: list[float], cost_model: CostModel, in_order: bool
) -> Figures:
    """Draw each request of `work` when it has arrived, in real time. `arrivals` are seconds from the start."""
    queue: RunQueue[tuple[int, Sample]] = RunQueue()
    latencies: list[float] = []
    coming = list(enumerate(zip(arrivals, work, strict=True)))
    start = time.perf_counter()
    while coming or queue:
        now = time.perf_counter() - start
        if not queue and coming and coming[0][1][0] > now:
            time.sleep(coming[0][1][0] - now)
            continue
        while coming and coming[0][1][0] <= now and not (in_order and queue):
            number, (_, request) = coming.pop(0)
            queue.add(
                str(number), (number, comparison.engine.prepare(request)[0]), cost_model.estimate_seconds(request)
            )
        number, sample = queue.peek()
        if left := comparison.engine.steps_left(sample):
            comparison.engine.step([sample])
            comparison.synchronize()
            queue.advance(str(number), 1 - (left - 1) / len(sample.times))
        else:
            comparison.engine.finish(sample)
            queue.remove(str(number))
            latencies.append(time.perf_counter() - start - arrivals[number])
    took = time.perf_counter() - start
    latencies.sort()
    return {
        "images_per_second": len(work) / took,
        "p50_s": statistics.median(latencies),
        "p95_s": latencies[int(0.95 * (len(latencies) - 1))],
    }
