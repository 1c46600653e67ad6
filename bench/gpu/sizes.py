"""Sizes that the warm-up has not seen: whether a compiled graph serves them, and what the first call costs."""

from contextlib import ExitStack
from unittest.mock import patch

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from bench.gpu.setup import REHEARSED, Results, Setup
from bench.support.comparison import Comparison, make_request
from pipelines.fields import Size
from pipelines.optimize import compile as compiling
from pipelines.optimize.attention import make_inputs, measure_seconds
from pipelines.optimize.context import OptimizationContext

NEW = (
    (512, 768), (768, 512), (544, 672), (640, 1152), (832, 1216), (896, 896),
    (1152, 896), (1280, 736), (1344, 768), (1504, 576), (1408, 1408), (1536, 1536),
)  # fmt: skip


def measure(setup: Setup) -> Results:
    torch.compiler.reset()
    with ExitStack() as stack:
        if setup.rehearse:  # on one size, by a compiler that compiles nothing
            stack.enter_context(patch.object(compiling, "SIZES", (Size(512, 512),)))
            comparison = setup.compare([*REHEARSED, "compile"], OptimizationContext("eager"))
        else:
            comparison = setup.compare()
        yield "optimizations that fail here", comparison.failed or "none"
        stack.callback(torch.compiler.set_stance, "default")
        sizes = NEW[:2] if setup.rehearse else NEW
        eager = 0
        for width, height in sizes:
            milliseconds, compiled = measure_first(comparison, width, height)
            eager += not compiled
            yield f"first calls {width}x{height}, ms", milliseconds
        yield f"of {len(sizes)} sizes eager", eager
        for name in dict.fromkeys(("native", comparison.choices.get("attention") or "native")):
            lengths = dict.fromkeys(width * height // 256 for width, height in sizes)
            first = [measure_first_attention(comparison, name, length) for length in lengths]
            yield f"first calls of attention {name}, ms", first


def measure_first(comparison: Comparison, width: int, height: int) -> tuple[list[float], bool]:
    """Milliseconds of the steps and the decoding of a new size, and whether the warm-up's graphs serve them."""
    torch.compiler.set_stance("fail_on_recompile")
    try:
        return draw(comparison, width, height), True
    except RuntimeError as error:
        if "recompile" not in str(error):
            raise
    compiling.forbid_compilation()  # as serving does
    return draw(comparison, width, height), False


def measure_first_attention(comparison: Comparison, name: str, length: int) -> float:
    """Milliseconds of a kernel's first call at about an image's `length`: a few tokens more, new to the kernel."""
    tokens = comparison.text_tokens + length + 8
    inputs = make_inputs(comparison.engine.pipeline.transformer, tokens)
    with torch.inference_mode():
        return 1e3 * measure_seconds(*inputs, AttentionBackendName(name))


def draw(comparison: Comparison, width: int, height: int) -> list[float]:
    """Milliseconds of the steps up to the first skipped one, and of a decoding."""
    engine = comparison.engine
    samples = engine.prepare(make_request(width, height, 28, "high"))
    steps = samples[0].computed.index(False) + 1
    seconds = [comparison.measure_seconds(lambda: engine.step(samples)) for _ in range(steps)]
    return [1e3 * one for one in (*seconds, comparison.measure_seconds(lambda: engine.finish(samples[0])))]
