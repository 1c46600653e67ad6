"""The engine compared with diffusers' own pipeline, on one device, in one process.

    srpo bench engine [--model flux|tiny] [--sizes 512x512,1440x512] [--steps 28] [--compiled] [--json FILE]

Each row times one image from prompt to pixels, after a warm-up, with the device synchronized before and after: seconds
(median, p95), the speed-up over `FluxPipeline` eager, and the share of the device's own matrix-product ceiling,
measured just before, that the computed steps reach over the whole time. Then follow the seconds of each stage, forward
passes of several samples with their peak of memory, and mixed load (see `bench.mixed_load`).
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bench.batches import measure_batches
from bench.mixed_load import measure_mixed_load
from bench.support.comparison import SIZES, Comparison, Figures, make_request
from bench.support.geometry import MODELS, step_flops
from bench.support.report import make_parser, parse_sizes, print_table, write_json
from pipelines.acceleration import PRESETS
from pipelines.loading.build import choose_dtype
from pipelines.loading.devices import choose_device
from pipelines.request import ImageRequest

STOCK = "FluxPipeline eager"
Contenders = dict[str, tuple[Callable[[ImageRequest], None], str]]  # by the row's name: what draws, and its preset


def list_contenders(comparison: Comparison) -> Contenders:
    presets = {f"srpo {preset}": (comparison.run_engine, preset) for preset in PRESETS}
    return {STOCK: (comparison.run_stock, "none"), **presets}


def measure(
    comparison: Comparison, contenders: Contenders, size: tuple[int, int], steps: int, repeats: int
) -> list[Figures]:
    """The rows of one size. Contenders alternate, so that all run on an equally busy machine."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, (draw, preset) in contenders.items():
            request = make_request(*size, steps, preset)
            took = comparison.measure_seconds(lambda draw=draw, request=request: draw(request))  # type: ignore[misc]
            if repeat:  # the first is warm-up
                seconds[name].append(took)
    flops = step_flops(comparison.pipeline.transformer.config, comparison.text_tokens, *size)
    return [
        {
            "size": f"{size[0]}x{size[1]}",
            "name": name,
            "computed_steps": sum(PRESETS[preset](steps)),
            "median_s": statistics.median(seconds[name]),
            "p95_s": sorted(seconds[name])[int(0.95 * (repeats - 1) + 0.5)],
            "flops": flops * sum(PRESETS[preset](steps)),
        }
        for name, (_, preset) in contenders.items()
    ]


def add_ratios(rows: list[Figures], ceiling: float) -> None:
    """Add to each row its speed-up over the stock pipeline, and its share of the ceiling (operations a second)."""
    base = {row["size"]: row["median_s"] for row in rows if row["name"] == STOCK}
    for row in rows:
        row["speed_up"] = base[row["size"]] / row["median_s"]
        row["of_ceiling"] = row.pop("flops") / row["median_s"] / ceiling


def run(options: argparse.Namespace) -> Figures:
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    comparison = Comparison(MODELS[options.model](dtype, device), device)
    sizes, steps, repeats = parse_sizes(options.sizes), options.steps, options.repeats
    ceiling = comparison.measure_ceiling()
    contenders = list_contenders(comparison)
    rows = [row for size in sizes for row in measure(comparison, contenders, size, steps, repeats)]
    stages = {f"{w}x{h}": comparison.measure_stages(make_request(w, h, steps, "high")) for w, h in sizes}
    batches = measure_batches(comparison, sizes)
    load = measure_mixed_load(comparison, options.requests, sizes, steps)
    if options.compiled:  # last, because it cannot be undone
        comparison.pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
        compiled: Contenders = {"FluxPipeline compiled": (comparison.run_stock, "none")}
        rows += [row for size in sizes for row in measure(comparison, compiled, size, steps, repeats)]
    add_ratios(rows, ceiling)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": f"{name}, {dtype}, {options.model}, {steps} steps, torch {torch.__version__}",
        "ceiling_tflops": ceiling / 1e12,
        "rows": rows,
        "stages": stages,
        "batches": batches,
        "mixed_load": load,
    }


def show(figures: Figures) -> None:
    rows = [
        (
            row["size"],
            row["name"],
            str(row["computed_steps"]),
            f"{row['median_s']:.3f}",
            f"{row['p95_s']:.3f}",
            f"{row['speed_up']:.2f}",
            f"{row['of_ceiling']:.0%}",
        )
        for row in figures["rows"]
    ]
    print_table(figures["device"], ("size", "", "computed", "median s", "p95 s", "speed-up", "of ceiling"), rows)
    show_group("stages, ms", figures["stages"], scale=1000)
    show_group("passes of several samples", figures["batches"])
    show_group("mixed load", figures["mixed_load"])


def show_group(title: str, group: dict[str, dict[str, Any]], scale: int = 1) -> None:
    names = list(next(iter(group.values())))
    rows = [
        (label, *("-" if values[name] is None else f"{scale * values[name]:.3f}" for name in names))
        for label, values in group.items()
    ]
    print_table(title, ("", *names), rows)


def main(arguments: list[str]) -> int:
    parser = make_parser("engine", __doc__)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--compiled", action="store_true", help="also FluxPipeline with its blocks compiled (minutes)")
    options = parser.parse_args(arguments)
    figures = run(options)
    show(figures)
    write_json(figures, options.json)
    return 0
