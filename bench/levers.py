"""Each lever alone, and all together, beside diffusers' pipeline eager and compiled.

    srpo bench levers --json FILE [--model flux|tiny] [--sizes 512x512,1440x512] [--steps 28]

Every row is one image, prompt to pixels, synchronised between its stages: seconds (median, p95), how many times faster
than `FluxPipeline` eager, the share of the device's own matrix-product ceiling in the pipeline's type, a computed and a
skipped step, and everything but the loop. Rows are written to FILE as they come: the same command goes on from there.
A lever alone is measured with every step computed, fp8 too. A row that cannot be had says why.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import SIZES, Bench, Figures, ask
from bench.geometry import MODELS, Model, own_copy, step_flops
from pipelines.acceleration import PRESETS
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.loading.build import choose_device, choose_dtype
from pipelines.optimize.apply import OptimizationFailed, apply_optimizations
from pipelines.optimize.optimizations import OPTIMIZATIONS
from pipelines.request import ImageRequest

STOCK, COMPILED = "FluxPipeline eager", "FluxPipeline compiled"
EXACT_ALL = [name for name, optimization in OPTIMIZATIONS.items() if optimization.accuracy != "float8"]


class Contender(NamedTuple):
    """What draws the images of a group of rows: the stock pipeline (no levers: None), or ours with these levers."""

    name: str
    preset: str
    levers: tuple[str, ...] | None


def contenders() -> list[Contender]:
    alone = [Contender(name, "none", (name,)) for name in OPTIMIZATIONS]
    together = [Contender(f"all but fp8, {preset}", preset, tuple(EXACT_ALL)) for preset in PRESETS]
    quantized = [Contender(f"all, {preset}", preset, tuple(OPTIMIZATIONS)) for preset in PRESETS if preset != "none"]
    stock = [Contender(name, "none", None) for name in (STOCK, COMPILED)]
    return [*stock, Contender("no lever", "none", ()), *alone, *together, *quantized]


class Drawn:
    """A contender that is ready to draw: `stages` gives the seconds of text, loop and decoding."""

    def __init__(self, bench: Bench, contender: Contender, compiler: str) -> None:
        torch.compiler.reset()
        self._bench = bench
        self._preset = contender.preset
        self.pipeline = own_copy(bench.pipeline)
        self.pipeline.set_progress_bar_config(disable=True)
        self.engine: FluxEngine | None = None
        if contender.name == COMPILED:
            self.pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=compiler)
        if contender.levers is not None:
            precision = str(self.pipeline.transformer.dtype).removeprefix("torch.")
            info = EngineInfo("bench", str(bench.device), precision, "")
            self.engine = FluxEngine(self.pipeline, bench.text_tokens, info)
            self.engine.compiler = compiler
            apply_optimizations(self.engine, contender.levers)
            if contender.levers == ("fp8",):
                self.engine.variants["none"] = self.engine.variants["high"]

    def ask(self, size: tuple[int, int], steps: int) -> ImageRequest:
        return ask(*size, steps, self._preset)

    def stages(self, request: ImageRequest) -> list[float]:
        seconds, engine = self._bench.seconds, self.engine
        if engine is None:
            return [seconds(lambda: self._bench.stock(request, self.pipeline))]
        samples: list[Any] = []

        def loop() -> None:
            for _ in range(request.num_inference_steps):
                engine.step(samples)

        text = seconds(lambda: samples.extend(engine.prepare(request)))
        return [text, seconds(loop), seconds(lambda: engine.finish(samples[0]))]

    def waits(self, request: ImageRequest) -> bool | None:
        """Whether a step waits for the device: asked of CUDA itself."""
        if self.engine is None or self._bench.device.type != "cuda":
            return None
        samples = self.engine.prepare(request)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(request.num_inference_steps):
                self.engine.step(samples)
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def steps(self, request: ImageRequest) -> dict[bool, float]:
        """Median seconds of a computed and of a skipped step."""
        engine = self.engine
        if engine is None:
            return {}
        samples, taken = engine.prepare(request), dict[bool, list[float]]()
        for compute in samples[0].computed:
            taken.setdefault(compute, []).append(self._bench.seconds(lambda: engine.step(samples)))
        return {kind: statistics.median(times) for kind, times in taken.items()}


def measure(drawn: Drawn, size: tuple[int, int], steps: int, repeats: int) -> Figures:
    """The figures of one row, warm-up apart."""
    request = drawn.ask(size, steps)
    drawn.stages(request)
    runs = sorted((drawn.stages(request) for _ in range(repeats)), key=sum)
    totals = [sum(stages) for stages in runs]
    kinds = drawn.steps(request)
    rest = [stages[0] + stages[2] for stages in runs if len(stages) == 3]
    return {
        "computed_steps": sum(PRESETS[request.acceleration](steps)),
        "median_s": statistics.median(totals),
        "p95_s": totals[int(0.95 * (repeats - 1) + 0.5)],
        "step_s": kinds.get(True),
        "skipped_step_s": kinds.get(False),
        "rest_s": statistics.median(rest) if rest else None,
        "waits": drawn.waits(request),
    }


def measure_all(bench: Bench, options: argparse.Namespace, figures: Figures, save: Callable[[], None]) -> None:
    """Add the rows that `figures` does not have yet, and save after each."""
    sizes = [(int(width), int(height)) for width, height in (size.split("x") for size in options.sizes.split(","))]
    for contender in contenders():
        have = {(row["name"], row["size"]) for row in figures["rows"]}
        missing = [(w, h) for w, h in sizes if (contender.name, f"{w}x{h}") not in have]
        drawn: Drawn | None = None
        for size in missing:
            row: Figures = {"size": f"{size[0]}x{size[1]}", "name": contender.name}
            try:
                drawn = drawn or Drawn(bench, contender, options.compiler)
                row |= measure(drawn, size, options.steps, options.repeats)
            except (OptimizationFailed, RuntimeError) as error:
                row["error"] = str(error).strip().partition("\n")[0]
            figures["rows"].append(row)
            save()


def compare(figures: Figures, bench: Bench) -> None:
    """Add to each row its ratio to the baseline and its share of the ceiling."""
    base = {row["size"]: row.get("median_s") for row in figures["rows"] if row["name"] == STOCK}
    for row in figures["rows"]:
        if "median_s" in row and base.get(row["size"]):
            width, height = map(int, row["size"].split("x"))
            flops = step_flops(bench.pipeline.transformer.config, bench.text_tokens, width, height)
            row["speed_up"] = base[row["size"]] / row["median_s"]
            row["of_ceiling"] = flops * row["computed_steps"] / row["median_s"] / figures["ceiling_tflops"] / 1e12


def show(figures: Figures) -> None:
    columns = ("median s", "p95 s", "speed-up", "of ceiling", "step ms", "skipped ms", "rest ms", "waits")
    table = Table("size", "", "computed", *columns, title=figures["device"])
    for row in sorted(figures["rows"], key=lambda row: [int(side) for side in row["size"].split("x")]):
        if "error" in row:
            table.add_row(row["size"], row["name"], "-", row["error"])
            continue
        stages = ("-" if (s := row[k]) is None else f"{1e3 * s:.2f}" for k in ("step_s", "skipped_step_s", "rest_s"))
        shown = (
            f"{row['median_s']:.3f}",
            f"{row['p95_s']:.3f}",
            f"{row.get('speed_up', nan):.2f}",
            f"{row.get('of_ceiling', nan):.0%}",
        )
        waits = {None: "-", True: "yes", False: "no"}[row["waits"]]
        table.add_row(row["size"], row["name"], str(row["computed_steps"]), *shown, *stages, waits)
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="srpo bench levers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = torch.device(choose_device(options.device))
    dtype = choose_dtype(options.dtype, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    label = f"{name}, {dtype}, {options.model}, {options.steps} steps, torch {torch.__version__}"
    file: Path = options.json
    figures: Figures = json.loads(file.read_text()) if file.exists() else {"device": label, "rows": []}
    if figures["device"] != label:
        parser.error(f"{file} holds the figures of {figures['device']}, this is {label}: give another file")
    model: Model = MODELS[options.model](dtype, device)
    bench = Bench(model, device)
    figures.setdefault("ceiling_tflops", bench.ceiling() / 1e12)

    def save() -> None:
        compare(figures, bench)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(figures, indent=2) + "\n")
        new.replace(file)

    measure_all(bench, options, figures, save)
    show(figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
