"""Compilation: few graphs, all of them made before the engine is ready and stored on disk.

Each block is compiled by itself with symbolic sizes, so that all blocks of a class and all image sizes share a graph.
Each precision needs a graph of its own, and so does a batch of several rows. Nothing is compiled while serving: a step
for which there is no graph runs eagerly.
"""

import json
import os
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from pipelines.engine.base import Report
from pipelines.engine.failures import is_out_of_memory
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.fields import Size
from pipelines.optimize.batching import find_exact_batches
from pipelines.optimize.context import Change, OptimizationContext
from pipelines.request import ImageRequest, Source, make_probe

GRAPHS = 64  # that one block class may have; torch gives up after 8, and two precisions with three batches need 12
# Inductor tunes a graph for the size that it is first compiled at: a large one, which is what most requests ask for.
SIZES = (Size(1024, 1024), Size(1440, 512), Size(1024, 768), Size(512, 512))
STEPS = 28  # the presets skip some of them
COMPILED = ("compile", "compile_vae")  # rows of OPTIMIZATIONS
# Given with each compilation: a flag of the process does not last, because tracing sets it back (torch 2.13).
INDUCTOR_OPTIONS = {
    "deterministic": True,  # no kernel is chosen by timing: the same bits after the cache was lost
    # With it torch 2.13 fails with CantSplit where float8 quantizes the single block's joined attention and MLP.
    "loop_ordering_after_fusion": False,
}
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def set_cache_folder(folder: Path) -> None:
    """Store compiled kernels in a folder. To be called before the first compilation."""
    for variable, name in FOLDERS.items():
        os.environ[variable] = str(folder / name)


def configure_compiler() -> None:
    """Set the process's compiler: enough graphs, for all sizes."""
    import torch.fx.experimental._config as shapes  # takes seconds, so only where something is compiled
    from torch._dynamo import config

    config.recompile_limit = GRAPHS
    config.accumulated_recompile_limit = 4 * GRAPHS
    shapes.use_duck_shape = False  # otherwise a graph compiled for a square serves squares only


def compile_transformers(engine: FluxEngine, context: OptimizationContext) -> Change:
    """Compile the blocks of every variant, once for each class.

    Which batches are exact without compilation is found out before: on a GPU it is often none, and each would take a
    graph of its own.
    """
    batches = {size: recall_exact_batches(engine, size, context) for size in context.batch_sizes}
    configure_compiler()
    for variant in engine.distinct_variants():
        variant.transformer.compile_repeated_blocks(
            fullgraph=True, dynamic=True, backend=context.compiler, options=INDUCTOR_OPTIONS
        )
    return Change(replace(engine.options, batches=batches))


def recall_exact_batches(engine: FluxEngine, size: Size, context: OptimizationContext) -> tuple[int, ...]:
    """The numbers of samples that may share an eager forward pass at a size."""

    def measure() -> str:
        # It is tried before the warm-up, and progress must not go back.
        return json.dumps(find_exact_batches(engine, size, report=lambda stage, _: context.report(stage, 0.95)))

    return tuple(json.loads(context.remember(f"eager batches {size.width}x{size.height}", measure)))


def uncompile_transformers(engine: FluxEngine) -> EngineOptions:
    """Run the blocks eagerly again."""
    for variant in engine.distinct_variants():
        for block in (*variant.transformer.transformer_blocks, *variant.transformer.single_transformer_blocks):
            block._compiled_call_impl = None
    return replace(engine.options, batches={})


def compile_decoder(engine: FluxEngine, context: OptimizationContext) -> Change:
    """Compile the VAE's decoder."""
    configure_compiler()
    # The decoder asks for torch's version through an lru_cache, which is harmless.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    engine.pipeline.vae.decoder.compile(
        fullgraph=True, dynamic=True, backend=context.compiler, options=INDUCTOR_OPTIONS
    )
    return Change(engine.options)


def uncompile_decoder(engine: FluxEngine) -> EngineOptions:
    """Run the decoder eagerly again."""
    engine.pipeline.vae.decoder._compiled_call_impl = None
    return engine.options


def warm_up(engine: FluxEngine, optimization: str, report: Report) -> None:
    """Run what serving will run: for `compile` every kind of step in every number of rows, for `encoding` an encoding a
    size of the picture that image-to-image begins with, else a decoding a size."""
    presets = {id(variant): preset for preset, variant in engine.variants.items()}.values()  # one a precision
    if optimization == "compile":
        batches = [(size, count) for size, counts in engine.options.batches.items() for count in counts]
        kinds = [(preset, *one) for preset, one in product(presets, [*product(SIZES, [1]), *batches])]
    else:
        kinds = [("none", size, 0) for size in SIZES]
    for done, (preset, size, count) in enumerate(kinds):
        report(f"warming up {optimization}: {done} of {len(kinds)}", 0.95 + 0.01 * done / len(kinds))
        request = make_probe(size, STEPS, preset, prompt="warm-up")
        if optimization == "encoding":
            request = replace(request, source=Source(bytes(3 * size.width * size.height), 1.0))
        try:
            run_once(engine, request, count)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()  # such a request will fail, too, with an error of its own


@torch.inference_mode()
def run_once(engine: FluxEngine, request: ImageRequest, count: int) -> None:
    """Take steps of `count` samples in one pass, up to and including the first skipped one; for 0, decode one. A source
    is only encoded."""
    samples = [engine.prepare(request)[0] for _ in range(max(1, count))]
    computed = samples[0].computed
    for _ in range((computed.index(False) + 1 if False in computed else 1) if count else 0):
        engine.step(samples)
    if not count and request.source is None:
        engine.finish(samples[0])


def forbid_compilation() -> None:
    """Let this process compile nothing from now on."""
    torch.compiler.set_stance("eager_on_recompile")
