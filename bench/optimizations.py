"""Each optimization alone, and all together, compared with diffusers' pipeline eager and compiled.

    srpo bench optimizations --json FILE [--model flux|tiny] [--sizes 512x512,1440x512] [--steps 28]

Each row times one image from prompt to pixels, synchronized between its stages: seconds (median, p95), the speed-up
over `FluxPipeline` eager, the share of the device's own matrix-product ceiling, a computed and a skipped step, and
everything but the steps. A single optimization is measured with every step computed, fp8 too. A row that cannot be
measured says why. Rows are written to FILE one by one: the same command continues an interrupted run.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.support.comparison import SIZES, Comparison, Figures, find_device_wait, make_request
from bench.support.geometry import MODELS, own_copy, step_flops
from bench.support.report import make_parser, parse_sizes, print_table, write_json
from pipelines.acceleration import PRESETS
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.loading.build import choose_dtype
from pipelines.loading.devices import choose_device
from pipelines.optimize.apply import OptimizationFailed, apply_optimizations
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import OPTIMIZATIONS
from pipelines.request import ImageRequest

STEP_FIGURES = ("step_s", "skipped_step_s", "rest_s")
STOCK, COMPILED = "FluxPipeline eager", "FluxPipeline compiled"
EXACT_ALL = [name for name, optimization in OPTIMIZATIONS.items() if optimization.accuracy != "float8"]


class Contender(NamedTuple):
    """What draws the images of some rows: the stock pipeline (`optimizations` is None), or our engine with these."""

    name: str
    preset: str
    optimizations: tuple[str, ...] | None


def list_contenders() -> list[Contender]:
    alone = [Contender(name, "none", (name,)) for name in OPTIMIZATIONS]
    together = [Contender(f"all but fp8, {preset}", preset, tuple(EXACT_ALL)) for preset in PRESETS]
    quantized = [Contender(f"all, {preset}", preset, tuple(OPTIMIZATIONS)) for preset in PRESETS if preset != "none"]
    stock = [Contender(name, "none", None) for name in (STOCK, COMPILED)]
    return [*stock, Contender("no optimization", "none", ()), *alone, *together, *quantized]


class ContenderRun:
    """A contender, loaded and ready to draw."""

    def __init__(self, comparison: Comparison, contender: Contender, compiler: str) -> None:
        torch.compiler.reset()
        self._comparison = comparison
        self._preset = contender.preset
        self.pipeline = own_copy(comparison.pipeline)
        self.pipeline.set_progress_bar_config(disable=True)
        self.engine: FluxEngine | None = None
        if contender.name == COMPILED:
            self.pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=compiler)
        if contender.optimizations is not None:
            precision = str(self.pipeline.transformer.dtype).removeprefix("torch.")
            info = EngineInfo("bench", str(comparison.device), precision, "")
            plain = FluxEngine(self.pipeline, EngineOptions(info, comparison.text_tokens))
            context = OptimizationContext(compiler)
            self.engine, _ = apply_optimizations(plain, contender.optimizations, context=context)
            if contender.optimizations == ("fp8",):
                self.engine = self.engine.change(variants=dict.fromkeys(PRESETS, self.engine.variants["high"]))

    def make_request(self, size: tuple[int, int], steps: int) -> ImageRequest:
        return make_request(*size, steps, self._preset)

    def measure_stages(self, request: ImageRequest) -> list[float]:
        """Seconds of text, steps and decoding; one number, of the whole call, for the stock pipeline."""
        seconds, engine = self._comparison.measure_seconds, self.engine
        if engine is None:
            return [seconds(lambda: self._comparison.run_stock(request, self.pipeline))]
        samples: list[Any] = []

        def loop() -> None:
            for _ in range(request.num_inference_steps):
                engine.step(samples)

        text = seconds(lambda: samples.extend(engine.prepare(request)))
        return [text, seconds(loop), seconds(lambda: engine.finish(samples[0]))]

    def measure_steps(self, request: ImageRequest) -> dict[bool, float]:
        """Median seconds of a computed and of a skipped step."""
        engine = self.engine
        if engine is None:
            return {}
        samples, taken = engine.prepare(request), dict[bool, list[float]]()
        for compute in samples[0].computed:
            taken.setdefault(compute, []).append(self._comparison.measure_seconds(lambda: engine.step(samples)))
        return {kind: statistics.median(times) for kind, times in taken.items()}


def measure(run: ContenderRun, size: tuple[int, int], steps: int, repeats: int) -> Figures:
    """The figures of one row, warm-up apart."""
    request = run.make_request(size, steps)
    run.measure_stages(request)
    runs = sorted((run.measure_stages(request) for _ in range(repeats)), key=sum)
    totals = [sum(stages) for stages in runs]
    kinds = run.measure_steps(request)
    rest = [stages[0] + stages[2] for stages in runs if len(stages) == 3]
    return {
        "computed_steps": sum(PRESETS[request.acceleration](steps)),
        "median_s": statistics.median(totals),
        "p95_s": totals[int(0.95 * (repeats - 1) + 0.5)],
        "step_s": kinds.get(True),
        "skipped_step_s": kinds.get(False),
        "rest_s": statistics.median(rest) if rest else None,
        "waits": run.engine and find_device_wait(run.engine, request),
    }


def measure_missing(
    comparison: Comparison, options: argparse.Namespace, figures: Figures, save: Callable[[], None]
) -> None:
    """Add the rows that `figures` does not have yet, and save after each."""
    sizes = parse_sizes(options.sizes)
    for contender in list_contenders():
        measured = {(row["name"], row["size"]) for row in figures["rows"]}
        missing = [(w, h) for w, h in sizes if (contender.name, f"{w}x{h}") not in measured]
        run: ContenderRun | None = None
        for size in missing:
            row: Figures = {"size": f"{size[0]}x{size[1]}", "name": contender.name}
            try:
                run = run or ContenderRun(comparison, contender, options.compiler)
                row |= measure(run, size, options.steps, options.repeats)
            except (OptimizationFailed, RuntimeError) as error:
                row["error"] = str(error).strip().partition("\n")[0]
            figures["rows"].append(row)
            save()


def add_ratios(figures: Figures, comparison: Comparison) -> None:
    """Add to each row its speed-up over the stock pipeline, and its share of the ceiling."""
    base = {row["size"]: row.get("median_s") for row in figures["rows"] if row["name"] == STOCK}
    for row in figures["rows"]:
        if "median_s" in row and base.get(row["size"]):
            width, height = map(int, row["size"].split("x"))
            flops = step_flops(comparison.pipeline.transformer.config, comparison.text_tokens, width, height)
            row["speed_up"] = base[row["size"]] / row["median_s"]
            row["of_ceiling"] = flops * row["computed_steps"] / row["median_s"] / figures["ceiling_tflops"] / 1e12


def show(figures: Figures) -> None:
    columns = ("median s", "p95 s", "speed-up", "of ceiling", "step ms", "skipped ms", "rest ms", "waits")
    rows = sorted(figures["rows"], key=lambda row: [int(side) for side in row["size"].split("x")])
    print_table(figures["device"], ("size", "", "computed", *columns), map(format_row, rows))


def format_row(row: Figures) -> list[str]:
    if "error" in row:
        return [row["size"], row["name"], "-", row["error"]]
    milliseconds = ("-" if row[key] is None else f"{1e3 * row[key]:.2f}" for key in STEP_FIGURES)
    return [
        row["size"],
        row["name"],
        str(row["computed_steps"]),
        f"{row['median_s']:.3f}",
        f"{row['p95_s']:.3f}",
        f"{row.get('speed_up', nan):.2f}",
        f"{row.get('of_ceiling', nan):.0%}",
        *milliseconds,
        "-" if row["waits"] is None else "yes" if row["waits"] else "no",
    ]


def main(arguments: list[str]) -> int:
    parser = make_parser("optimizations", __doc__)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    options = parser.parse_args(arguments)
    if options.json is None:
        parser.error("the following arguments are required: --json")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    label = f"{name}, {dtype}, {options.model}, {options.steps} steps, torch {torch.__version__}"
    file: Path = options.json
    figures: Figures = json.loads(file.read_text()) if file.exists() else {"device": label, "rows": []}
    if figures["device"] != label:
        parser.error(f"{file} holds the figures of {figures['device']}, this is {label}: give another file")
    comparison = Comparison(MODELS[options.model](dtype, device), device)
    figures.setdefault("ceiling_tflops", comparison.measure_ceiling() / 1e12)

    def save() -> None:
        add_ratios(figures, comparison)
        write_json(figures, file)

    measure_missing(comparison, options, figures, save)
    show(figures)
    return 0
