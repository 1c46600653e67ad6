"""The engine against diffusers' own pipeline, on one device, in one process.

    srpo bench engine [--model flux|tiny] [--sizes 512x512,1440x512] [--steps 28] [--compiled] [--json FILE]

Every row is the whole way of one image, prompt to pixels, device synchronised around it, warm-up apart: seconds
(median, p95), how many times faster than `FluxPipeline` eager, and the share of the device's own matrix-product
ceiling, measured a moment before, that the computed steps take of the whole time. Then passes of several samples, with
the peak of memory; and mixed load: unlike requests in a burst and as a Poisson stream, in the scheduler's order against
first come first served.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.batches import REPEATS, measure_batches
from bench.geometry import MODELS, Model, own_copy, step_flops
from pipelines.acceleration import PRESETS
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.engine.sample import Sample
from pipelines.loading.build import choose_device, choose_dtype
from pipelines.optimize.apply import apply_optimizations
from pipelines.optimize.optimizations import chosen
from pipelines.request import GenerationParams, ImageRequest
from pipelines.workers.cost_model import CostModel
from pipelines.workers.run_queue import RunQueue

SIZES = "512x512,1440x512,1024x768,1024x1024,1536x1536"
PROMPT = "a red apple on a wooden table, morning light"
LOAD = 0.8  # of what the device can do, for the Poisson stream
Figures = dict[str, Any]


def ask(width: int, height: int, steps: int, preset: str, seed: int = 7) -> ImageRequest:
    size = {"width": width, "height": height}
    body = {"prompt": PROMPT, "image_size": size, "num_inference_steps": steps, "acceleration": preset, "seed": seed}
    return GenerationParams.model_validate(body).to_request("bench")


class Bench:
    """One model on one device: the stock pipeline and our engine on the same weights."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self.device = device
        self.pipeline = model.pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.text_tokens = model.text_tokens
        self.engine = FluxEngine(own_copy(model.pipeline), model.text_tokens, EngineInfo("bench", str(device), "", ""))
        levers = chosen(("default",), device.type)
        apply_optimizations(self.engine, levers, optional=levers)

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def stock(self, request: ImageRequest, pipeline: Any = None) -> None:
        """What a user would otherwise run."""
        (pipeline or self.pipeline)(
            request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seeds[0]),
            max_sequence_length=self.text_tokens,
        )

    def ours(self, request: ImageRequest) -> None:
        for sample in self.engine.prepare(request):
            while self.engine.steps_left(sample):
                self.engine.step([sample])
            self.engine.finish(sample)

    def prepare(self, width: int, height: int, seed: int) -> Sample:
        """A sample at its first of enough steps that every one is computed."""
        return self.engine.prepare(ask(width, height, 2 * REPEATS, "none", seed))[0]

    def stages(self, request: ImageRequest) -> Figures:
        """Seconds of each stage, every one synchronised; a step is the median of its kind."""
        with torch.inference_mode():
            new = f"{request.prompt}, {request.width} by {request.height}"  # not among the remembered ones
            text = self.seconds(lambda: self.engine.encode(new))
        sample = self.engine.prepare(request)[0]
        steps: dict[bool, list[float]] = {True: [], False: []}
        for compute in sample.computed:
            steps[compute].append(self.seconds(lambda: self.engine.step([sample])))
        medians = {compute: statistics.median(measured) for compute, measured in steps.items() if measured}
        decode = self.seconds(lambda: self.engine.finish(sample))
        return {"text": text, "step": medians[True], "skipped_step": medians.get(False), "decode": decode}

    def ceiling(self) -> float:
        """The best of a few square matrix products, in operations a second."""
        side = 8192 if self.device.type == "cuda" else 512
        left, right = torch.randn(2, side, side, device=self.device, dtype=self.pipeline.transformer.dtype)
        torch.mm(left, right)
        return 2 * side**3 / min(self.seconds(lambda: torch.mm(left, right)) for _ in range(10))


def contenders(bench: Bench) -> dict[str, tuple[Callable[[ImageRequest], None], str]]:
    """Each row's name: what draws it, and with which preset."""
    ours = {f"srpo {preset}": (bench.ours, preset) for preset in PRESETS}
    return {"FluxPipeline eager": (bench.stock, "none"), **ours}


def measure(bench: Bench, names: dict[str, Any], size: tuple[int, int], steps: int, repeats: int) -> list[Figures]:
    """The rows of one size. Contenders alternate, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, (draw, preset) in names.items():
            took = bench.seconds(lambda draw=draw, preset=preset: draw(ask(*size, steps, preset)))  # type: ignore[misc]
            if turn:  # the first is warm-up
                times[name].append(took)
    flops = step_flops(bench.pipeline.transformer.config, bench.text_tokens, *size)
    return [
        {
            "size": f"{size[0]}x{size[1]}",
            "name": name,
            "computed_steps": sum(PRESETS[preset](steps)),
            "median_s": statistics.median(times[name]),
            "p95_s": sorted(times[name])[int(0.95 * (repeats - 1) + 0.5)],
            "flops": flops * sum(PRESETS[preset](steps)),
        }
        for name, (_, preset) in names.items()
    ]


def mixed_load(bench: Bench, requests: int, sizes: list[tuple[int, int]], most_steps: int) -> Figures:
    """Latencies of the same unlike requests in the scheduler's order and first come first served."""
    chance = random.Random(5)
    lengths = [max(1, round(most_steps * part)) for part in (0.15, 0.5, 0.5, 1.0)]
    presets = list(PRESETS)
    work = [
        ask(*chance.choice(sizes), chance.choice(lengths), chance.choice(presets), seed)
        for seed in range(1, requests + 1)
    ]
    cost_model = CostModel()
    for request in work[:8]:
        took = bench.seconds(lambda request=request: bench.ours(request))  # type: ignore[misc]
        cost_model.drawn(request, {"text": 0.0, "denoise": took, "decode": 0.0})
    gap = statistics.mean(cost_model.seconds(request) for request in work) / LOAD
    stream = [0.0]
    while len(stream) < requests:
        stream.append(stream[-1] + chance.expovariate(1 / gap))
    figures: Figures = {}
    for shape, arrivals in (("burst", [0.0] * requests), ("poisson", stream)):
        for order in ("scheduler", "first_come"):
            figures[f"{shape}_{order}"] = replay(bench, work, arrivals, cost_model, in_order=order == "first_come")
    return figures


def replay(
    bench: Bench, work: list[ImageRequest], arrivals: list[float], cost_model: CostModel, in_order: bool
) -> Figures:
    """Draw `work` in real time as it arrives."""
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
            queue.add(str(number), (number, bench.engine.prepare(request)[0]), cost_model.seconds(request))
        number, sample = queue.next()
        if left := bench.engine.steps_left(sample):
            bench.engine.step([sample])
            bench.synchronize()
            queue.advance(str(number), 1 - (left - 1) / len(sample.times))
        else:
            bench.engine.finish(sample)
            queue.drop(str(number))
            latencies.append(time.perf_counter() - start - arrivals[number])
    took = time.perf_counter() - start
    latencies.sort()
    return {
        "images_per_second": len(work) / took,
        "p50_s": statistics.median(latencies),
        "p95_s": latencies[int(0.95 * (len(latencies) - 1))],
    }


def show(figures: Figures) -> None:
    console = Console()
    table = Table("size", "", "computed", "median s", "p95 s", "speed-up", "of ceiling", title=figures["device"])
    for row in figures["rows"]:
        shown = (f"{row['median_s']:.3f}", f"{row['p95_s']:.3f}", f"{row['speed_up']:.2f}", f"{row['of_ceiling']:.0%}")
        table.add_row(row["size"], row["name"], str(row["computed_steps"]), *shown)
    console.print(table)
    groups = (("stages, ms", "stages"), ("passes of several samples", "batches"), ("mixed load", "mixed_load"))
    for title, key in groups:
        group = figures[key]
        names = list(next(iter(group.values())))
        table = Table("", *names, title=title)
        for label, values in group.items():
            scale = 1000 if title == "stages, ms" else 1
            table.add_row(label, *("-" if values[name] is None else f"{scale * values[name]:.3f}" for name in names))
        console.print(table)


def run(arguments: argparse.Namespace) -> Figures:
    device = torch.device(choose_device(arguments.device))
    dtype = choose_dtype(arguments.dtype, device)
    bench = Bench(MODELS[arguments.model](dtype, device), device)
    sizes = [(int(size.split("x")[0]), int(size.split("x")[1])) for size in arguments.sizes.split(",")]
    ceiling = bench.ceiling()
    names = contenders(bench)
    rows = [row for size in sizes for row in measure(bench, names, size, arguments.steps, arguments.repeats)]
    stages = {f"{w}x{h}": bench.stages(ask(w, h, arguments.steps, "high")) for w, h in sizes}
    batches = measure_batches(bench, sizes)
    load = mixed_load(bench, arguments.requests, sizes, arguments.steps)
    if arguments.compiled:  # last: it stays
        bench.pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        for size in sizes:
            rows += measure(
                bench, {"FluxPipeline compiled": (bench.stock, "none")}, size, arguments.steps, arguments.repeats
            )
    base = {row["size"]: row["median_s"] for row in rows if row["name"] == "FluxPipeline eager"}
    for row in rows:
        row["speed_up"] = base[row["size"]] / row["median_s"]
        row["of_ceiling"] = row.pop("flops") / row["median_s"] / ceiling
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": f"{name}, {dtype}, {arguments.model}, {arguments.steps} steps, torch {torch.__version__}",
        "ceiling_tflops": ceiling / 1e12,
        "rows": rows,
        "stages": stages,
        "batches": batches,
        "mixed_load": load,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="srpo bench engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--compiled", action="store_true", help="also FluxPipeline with its blocks compiled (minutes)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    figures = run(options)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
