"""The host's part of a step of FLUX.1 [dev]: what Python does so that kernels can be launched.

    srpo bench host [--steps 30] [--layers 19 38] [--json FILE]

No GPU takes part: tensors are torch's `meta` ones, shapes without values, in FLUX.1's sizes. Milliseconds of one core
for a computed step at 1440x512, the median. `ours` is the engine's own code: the model's parts are functions that
return at once. `compiled` adds what torch does around each of the 57 compiled blocks, guards above all; instead of
kernels there are their results.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from bench.support.comparison import make_request
from bench.support.geometry import Layers, flux
from bench.support.report import make_parser, print_table, write_json
from pipelines.engine.base import EngineInfo
from pipelines.engine.device_queue import Pacer
from pipelines.engine.flux import FluxEngine
from pipelines.engine.modulation import TransformerVariant
from pipelines.engine.options import EngineOptions
from pipelines.optimize.compile import configure_compiler
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.precompute import cache_rotaries, extract_modulation

META = torch.device("meta")
SIZE = (1440, 512)


def make_engine(double: int, single: int) -> FluxEngine:
    """The engine with as many blocks, with what CUDA has by default, except compilation."""
    options = EngineOptions(EngineInfo("bench", "meta", "bfloat16", ""), text_tokens=512)
    engine = FluxEngine(flux(torch.bfloat16, META, Layers(double, single, 1, 1)).pipeline, options)
    for apply in (cache_rotaries, extract_modulation):
        engine = FluxEngine(engine.pipeline, apply(engine, OptimizationContext()).options)
    engine._pacer = Pacer(torch.device("cpu"))  # `meta` queues nothing
    return engine


def without_kernels(engine: FluxEngine, *, blocks: bool) -> FluxEngine:
    """The engine with a transformer whose parts return at once; with `blocks` its blocks are the real ones."""
    tokens, width = SIZE[0] * SIZE[1] // 256, 3072
    text, image = (torch.empty(1, count, width, dtype=torch.bfloat16, device=META) for count in (512, tokens))
    velocity = torch.empty(1, tokens, 64, dtype=torch.bfloat16, device=META)
    variant, real = engine.variants["none"], engine.pipeline.transformer
    parts: dict[str, Any] = {
        "x_embedder": lambda _: image,
        "context_embedder": lambda _: text,
        "transformer_blocks": [lambda **_: (text, image)] * len(real.transformer_blocks),
        "single_transformer_blocks": [lambda **_: (text, image)] * len(real.single_transformer_blocks),
        "norm_out": lambda *_: image,
        "proj_out": lambda _: velocity,
        "pos_embed": real.pos_embed,
    }
    if blocks:
        parts |= {name: getattr(real, name) for name in ("transformer_blocks", "single_transformer_blocks")}
    stub = TransformerVariant(SimpleNamespace(**parts), variant.precision, variant.modulation)
    changed = engine.change(variants=dict.fromkeys(engine.variants, stub))
    changed._pacer = engine._pacer
    return changed


class Remembering:
    """A compiler whose graphs compute once and then return what they have returned."""

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        results: list[Any] = []

        def run(*args: Any) -> Any:
            if not results:
                results.append(graph(*args))
            return results[0]

        return run


def measure(engine: FluxEngine, steps: int) -> float:
    """Median milliseconds of a computed step, after a few that do not count."""
    seconds = []
    with patch("pipelines.engine.flux.copy_to_device", lambda tensor, device: tensor.to(device)):
        # `high`, but every step computed: the way of a computed step that is followed by skipped ones
        (sample,) = engine.prepare(make_request(*SIZE, 50, "high"))
    sample.computed = (True,) * 49 + (False,)
    for _ in range(min(steps + 5, 49)):
        start = time.thread_time()
        engine.step([sample])
        seconds.append(time.thread_time() - start)
    return 1e3 * statistics.median(seconds[5:])


def main(arguments: list[str]) -> int:
    parser = make_parser("host", __doc__)
    parser.add_argument("--steps", type=int, default=30, help="of each kind, at most 44")
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    options = parser.parse_args(arguments)
    engine = make_engine(*options.layers)
    figures = {"ours": measure(without_kernels(engine, blocks=False), options.steps)}
    configure_compiler()
    engine.pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=Remembering())
    figures["compiled"] = measure(without_kernels(engine, blocks=True), options.steps)
    print_table(
        f"host's part of a step, torch {torch.__version__}", ("", "ms"), [(k, f"{v:.2f}") for k, v in figures.items()]
    )
    write_json(figures, options.json)
    return 0
