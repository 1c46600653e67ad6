"""The most memory that each stage takes on a card, above the weights, by size: `python -m bench.memory`.

Measured without a card, on tensors of FLUX.1's shapes that have no values (`bench.support.fake_card`): every tensor of
the real engine is counted from its first to its last reference. What kernels take for themselves is not seen (cuDNN's
workspaces, CUDA's context, the allocator's rounding): `pipelines.loading.placement` adds a constant for it. A peak
depends on no weight and, but for the kept residuals, on no number of layers; so two double and three single blocks do.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.support.comparison import make_request
from bench.support.fake_card import CARD, FakeCard, fake_card
from bench.support.geometry import Layers, flux
from bench.support.memory import GIB
from bench.support.report import make_parser, print_table, write_json
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.request import Source
from weights.latent_rgb import FLUX_LATENT_RGB

FEW = Layers(double=2, single=3, t5=1, clip=1)
SIZES = ((512, 512), (1024, 768), (1440, 512), (1024, 1024), (1408, 1408), (1536, 1536))
STEPS = 4  # of 28: with `high` the fourth one is skipped


def measure_stages(engine: FluxEngine, card: FakeCard, width: int, height: int) -> dict[str, int]:
    """Bytes above what was held before, for one request and for one that begins at a picture."""
    request = make_request(width, height, 28, "high")
    samples: list[Any] = []

    def step() -> None:
        for _ in range(STEPS):
            engine.step(samples)

    work: dict[str, Callable[[], object]] = {
        "text": lambda: samples.extend(engine.prepare(request)),
        "step": step,
        "decode": lambda: engine.finish(samples.pop()),
        "picture": lambda: engine.prepare(replace(request, source=Source(bytes(3 * width * height), 0.8))),
    }
    gc.collect()
    before = card.memory.held  # a sample's own tensors count to each of its stages
    peaks = {}
    for name, do in work.items():
        card.memory.peak = card.memory.held
        do()
        peaks[name] = card.memory.peak - before
    return peaks


def main() -> None:
    parser: argparse.ArgumentParser = make_parser("memory", __doc__)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with fake_card() as card:
        info = EngineInfo("flux", str(CARD), "bfloat16", "")
        pipeline = flux(torch.bfloat16, CARD, FEW).pipeline
        for name, tile_above in (("whole", None), ("in tiles", 0.0)):
            engine = FluxEngine(pipeline, EngineOptions(info, 512, preview=FLUX_LATENT_RGB, tile_above=tile_above))
            for width, height in SIZES:
                peaks = measure_stages(engine, card, width, height)
                rows.append({"size": f"{width}x{height}", "decoding": name} | {
                    stage: f"{peak / GIB:.3f}" for stage, peak in peaks.items()
                })  # fmt: skip
    print_table("GiB above the weights, bfloat16", tuple(rows[0]), [list(row.values()) for row in rows])
    write_json(rows, options.json)


if __name__ == "__main__":
    main()
