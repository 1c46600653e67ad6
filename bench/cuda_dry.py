"""Inductor's code for cards that are not there: `python -m bench.cuda_dry`, with a CUDA build of torch and no driver.

The engine is built on a fake card of each compute capability and compiled as a worker does, up to the cubins, which
nothing launches. Each row: graphs, kernels that ptxas has compiled, whether the deterministic flag held when code was
generated, graphs that other sizes added, and seconds.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch

from bench.support.cards import CARDS
from bench.support.comparison import make_request
from bench.support.fake_card import CARD, fake_card
from bench.support.geometry import Layers, flux
from bench.support.inductor import Inductor, card_for_inductor
from bench.support.report import make_parser, print_table, write_json
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.optimize.apply import apply_optimizations
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import select_optimizations
from weights.formats.fp8_linear import Float8Linear, use_float8_linears

FLOAT8 = "float8"  # beside optimizations: the placement
FEW = Layers(double=2, single=3, t5=1, clip=1)


def place_in_float8(transformer: Any) -> None:
    """Store the blocks' weights as the placement `float8` does."""
    with torch.device(CARD):
        use_float8_linears(transformer)
    for layer in transformer.modules():
        if isinstance(layer, Float8Linear) and layer.bias is not None:
            layer.bias = torch.nn.Parameter(layer.bias.to(torch.bfloat16), requires_grad=False)


def generate(name: str, optimizations: Sequence[str], sizes: int) -> dict[str, Any]:
    """One row: the engine on a fake card of the capability `name`, warmed up, and then other sizes."""
    torch._dynamo.reset()
    inductor, start = Inductor(CARDS[name]), time.perf_counter()
    with fake_card((inductor.card.major, inductor.card.minor)) as card, ExitStack() as stack:
        options = EngineOptions(EngineInfo("flux", str(CARD), "bfloat16", ""), text_tokens=512)
        pipeline = flux(torch.bfloat16, CARD, FEW).pipeline
        if FLOAT8 in optimizations:
            place_in_float8(pipeline.transformer)
        engine = FluxEngine(pipeline, options)
        stack.enter_context(card_for_inductor(inductor))
        wanted = [one for one in select_optimizations(optimizations, "cuda") if one != "attention"]
        engine, applied = apply_optimizations(engine, wanted, wanted, context=OptimizationContext(inductor))
        warm = inductor.graphs
        shapes = [(width, height) for width in range(512, 1537, 128) for height in range(512, 1537, 224)][:sizes]
        for (width, height), preset in zip(shapes, cycle(["none", "high"]), strict=False):
            (sample,) = engine.prepare(make_request(width, height, 28, preset))
            engine.step([sample])
            engine.finish(sample)
        assert not [wait for wait in card.waits if wait.startswith("flux.step")]
    return {
        "capability": name,
        "optimizations": ",".join(optimizations),
        "graphs": warm,
        "kernels": inductor.kernels,
        "deterministic": all(inductor.deterministic) and bool(inductor.deterministic),
        "recompiles": inductor.graphs - warm,
        "sizes": len(shapes),
        "failed": dict(applied.failed),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser: argparse.ArgumentParser = make_parser("cuda_dry", __doc__)
    parser.add_argument("--capabilities", default=",".join(CARDS))
    parser.add_argument("--optimizations", default="default;default,fp8;default,float8", help="sets, separated by ;")
    parser.add_argument("--sizes", type=int, default=40)
    options = parser.parse_args()
    rows = []
    for name in options.capabilities.split(","):
        for names in options.optimizations.split(";"):
            rows.append(generate(name, names.split(","), options.sizes))
            print(rows[-1], flush=True)
    print_table(f"torch {torch.__version__}", tuple(rows[0]), [[str(value) for value in row.values()] for row in rows])
    write_json(rows, options.json)


if __name__ == "__main__":
    main()
