"""A computed step with one choice changed at a time, beside the defaults. What is faster becomes a default."""

import gc
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from bench.gpu.setup import REHEARSED, Results, Setup
from bench.support.comparison import REPEATS, Comparison, make_request
from pipelines.fields import Size
from pipelines.optimize import compile as compiling
from pipelines.optimize.attention import CANDIDATES, measure_seconds
from pipelines.optimize.compile import INDUCTOR_OPTIONS
from pipelines.optimize.optimizations import OPTIMIZATIONS, select_optimizations

OF_STEPS = ("vae_layout", "compile_vae")  # these are of no step


def measure(setup: Setup) -> Results:
    defaults = list(REHEARSED) if setup.rehearse else select_optimizations(("default",), "cuda")
    defaults = [name for name in defaults if name not in OF_STEPS]
    for backend in CANDIDATES:
        yield f"attention {backend}, ms", measure_attention(setup, backend)
    with ExitStack() as stack:
        sizes = (Size(*setup.sizes[0]), Size(512, 512))
        stack.enter_context(patch.object(compiling, "SIZES", sizes))
        yield "defaults, ms", measure_variant(setup, defaults)
        with patch.dict(INDUCTOR_OPTIONS, {"coordinate_descent_tuning": True}):
            descent = partial(measure_variant, setup, defaults, "compiled-coordinate-descent")
            yield "coordinate descent, ms", setup.on_cuda(descent)
        fused = [name for name in OPTIMIZATIONS if name in (*defaults, "qkv")]
        yield "QKV fused, ms", measure_variant(setup, fused)
        with patch.object(compiling, "SIZES", sizes[::-1]):
            small_first = partial(measure_variant, setup, defaults, "compiled-small-first")
            yield "512x512 compiled first, ms", setup.on_cuda(small_first)
        for name in defaults:
            if OPTIMIZATIONS[name].accuracy != "exact":
                yield f"without {name}, ms", measure_variant(setup, [one for one in defaults if one != name])


def measure_attention(setup: Setup, name: str) -> float | str:
    """Milliseconds of the attention of one block at the first size, or why the kernel cannot be used."""
    width, height = setup.sizes[0]
    tokens, heads = (64, 2) if setup.rehearse else (512 + width * height // 256, 24)
    query, key, value = torch.randn(3, 1, tokens, heads, 128, device=setup.device, dtype=torch.bfloat16)
    backend = AttentionBackendName(name)
    try:
        with torch.inference_mode():
            return 1e3 * min(measure_seconds(query, key, value, backend) for _ in range(10))
    except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def measure_variant(setup: Setup, names: Sequence[str], compiled: str = "compiled-variants") -> float | str:
    """Milliseconds of a computed step at the first size; or why a variant does not work.

    Those that are compiled alike share the compile cache `compiled`. The other stages' was tuned for other sizes.
    """
    torch.compiler.reset()
    gc.collect()  # compiled blocks are cycles, and the model of the variant before hangs on them
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    comparison = setup.compare(names, compiled=compiled)
    if comparison.failed:
        return "; ".join(f"{name} fails: {reason}" for name, reason in comparison.failed.items())
    return 1e3 * measure_step(comparison, *setup.sizes[0])


def measure_step(comparison: Comparison, width: int, height: int) -> float:
    """Seconds of a computed step, the median of a few after two that do not count."""
    samples = comparison.engine.prepare(make_request(width, height, 28, "none"))
    seconds = [comparison.measure_seconds(lambda: comparison.engine.step(samples)) for _ in range(2 + 3 * REPEATS)]
    return statistics.median(seconds[2:])
