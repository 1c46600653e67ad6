"""Compilation: few graphs, all of them made before the engine is ready, kept on disk.

Each block is compiled by itself with symbolic sizes, so that all blocks of a class and all image sizes share a graph;
a precision and a number of rows that is not one need one more. Nothing is compiled while serving: what is not there
then runs as it is.
"""

import os
import warnings
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipelines.engine.base import Report
from pipelines.fields import Size
from pipelines.optimize.batching import COUNTS
from pipelines.request import ImageRequest

if TYPE_CHECKING:
    from pipelines.engine.flux import FluxEngine

GRAPHS = 64  # that one block class may have; torch gives up after 8, and two precisions with three batches need 12
SIZES = (Size(512, 512), Size(1024, 768), Size(1440, 512), Size(1024, 1024))
STEPS = 28  # the presets skip some of them
COMPILED = ("compile", "compile_vae")  # the levers
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def keep_in(folder: Path) -> None:
    """Let compiled kernels be kept in a folder. Before the first compilation."""
    for variable, name in FOLDERS.items():
        os.environ[variable] = str(folder / name)


def prepare_compiler() -> None:
    import torch._inductor.config as inductor  # seconds, which only those who compile shall wait
    import torch.fx.experimental._config as shapes
    from torch._dynamo import config

    config.recompile_limit = GRAPHS
    config.accumulated_recompile_limit = 4 * GRAPHS
    shapes.use_duck_shape = False  # else what was compiled for a square holds for squares alone
    inductor.deterministic = True  # no choice by timing: the same kernels, and bits, after the cache was lost


def compile_transformers(engine: "FluxEngine") -> str:
    prepare_compiler()
    for variant in engine.distinct_variants():
        variant.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=engine.compiler)
    return ""


def leave_transformers(engine: "FluxEngine") -> None:
    for variant in engine.distinct_variants():
        for block in (*variant.transformer.transformer_blocks, *variant.transformer.single_transformer_blocks):
            block._compiled_call_impl = None


def compile_decoder(engine: "FluxEngine") -> str:
    prepare_compiler()
    # diffusers asks for torch's version in the decoder; that the answer is cached is no matter
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    engine.pipeline.vae.decoder.compile(fullgraph=True, dynamic=True, backend=engine.compiler)
    return ""


def leave_decoder(engine: "FluxEngine") -> None:
    engine.pipeline.vae.decoder._compiled_call_impl = None


def warm_up(engine: "FluxEngine", optimization: str, report: Report) -> None:
    """Whatever will run is compiled after this: every kind of step once in every number of rows, or a decoding."""
    presets = {id(variant): preset for preset, variant in engine.variants.items()}.values()  # one a precision
    if optimization == "compile":
        kinds = [*product(presets, SIZES, [1]), *product(presets, SIZES[:1], COUNTS)]
    else:
        kinds = [("none", size, 0) for size in SIZES]
    for done, (preset, size, count) in enumerate(kinds):
        report(f"warming up {optimization}: {done} of {len(kinds)}", 0.95 + 0.01 * done / len(kinds))
        request = ImageRequest("", "warm-up", size.width, size.height, STEPS, 4.5, (1,), preset)
        try:
            run(engine, request, count)
        except torch.OutOfMemoryError:  # nor will such a request be drawn: it is told so when it comes
            torch.cuda.empty_cache()


@torch.inference_mode()
def run(engine: "FluxEngine", request: ImageRequest, count: int) -> None:
    """Steps of `count` samples in one pass, up to and with the first skipped one; for 0 the decoding of one."""
    samples = [engine.prepare(request)[0] for _ in range(max(1, count))]
    computed = samples[0].computed
    for _ in range((computed.index(False) + 1 if False in computed else 1) if count else 0):
        engine.step(samples)
    if not count:
        engine.finish(samples[0])


def freeze() -> None:
    """From now on nothing is compiled in this process."""
    torch.compiler.set_stance("eager_on_recompile")
