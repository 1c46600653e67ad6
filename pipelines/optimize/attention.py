"""Which attention kernel of torch and diffusers is the fastest on this device, among those that are correct."""

import time
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from pipelines.engine.failures import classify_failure
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.optimize.context import Change, OptimizationContext

# None of them downloads, and none computes in fewer bits than its inputs have.
CANDIDATES = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3")
PACKAGES = {"flash": "flash_attn", "_flash_3": "flash_attn_3"}  # that a candidate needs; the others are torch's
TOKENS = {"cuda": 3392, "cpu": 320}  # on CUDA: 1440x512 and 512 text tokens
OTHER_TOKENS = {"cuda": (1536, 3584, 4608), "cpu": (192, 256, 448)}  # on CUDA: 512x512, 1024x768 and 1024x1024
ROUNDINGS = 16  # how many roundings of the type a kernel may be away from the plain computation
REPEATS = 20
FIRST_IMAGE = 10  # steps that `high` computes of 28: what a kernel gains in so many is to outweigh its first call
WORTH = 0.95  # of the time of `native`: below it another one is taken, so that like devices make the same choice


def use_fastest_backend(engine: FluxEngine, context: OptimizationContext) -> Change:
    """Use the backend that was the fastest when it was first measured on this device, or `native` where its package is
    gone since then."""
    name = context.remember("attention", lambda: find_fastest(engine.pipeline.transformer))
    name = name if is_installed(name) else "native"
    return Change(set_backend(engine, name), name)


def use_native_backend(engine: FluxEngine) -> EngineOptions:
    """Use torch's own attention again."""
    return set_backend(engine, "native")


def set_backend(engine: FluxEngine, name: str) -> EngineOptions:
    for variant in engine.distinct_variants():
        variant.transformer.set_attention_backend(name)
    return engine.options


def is_installed(name: str) -> bool:
    return name not in PACKAGES or find_spec(PACKAGES[name]) is not None


@torch.inference_mode()
def find_fastest(transformer: Any) -> str:
    """The name of the backend. One that raises or computes something else is skipped; `native` always works.

    Some plan for each new number of tokens (cuDNN does). One that loses more by that than it gains is skipped, too.
    """
    device, dtype = transformer.device, transformer.dtype
    kind = device.type if device.type in TOKENS else "cpu"
    query, key, value = make_inputs(transformer, TOKENS[kind])
    others = [make_inputs(transformer, tokens) for tokens in OTHER_TOKENS[kind]]
    exact = dispatch_attention_fn(
        query.float(), key.float(), value.float(), backend=AttentionBackendName("_native_math")
    )
    allowed = ROUNDINGS * torch.finfo(dtype).eps * exact.abs().max()
    seconds, first = {"native": float("inf")}, {"native": 0.0}
    for name in filter(is_installed, CANDIDATES):
        try:
            backend = AttentionBackendName(name)
            close = (dispatch_attention_fn(query, key, value, backend=backend).float() - exact).abs().max() <= allowed
            if close:  # false for NaN
                first[name] = max(measure_seconds(*inputs, backend) for inputs in others)
                seconds[name] = min(measure_seconds(query, key, value, backend) for _ in range(REPEATS))
        except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError) as error:
            if classify_failure(error, device) is None:  # the device is lost: nothing after it can work
                raise
            continue  # not built into this torch, not installed, or not for this device or type
    calls = FIRST_IMAGE * (transformer.config.num_layers + transformer.config.num_single_layers)
    for name in sorted(seconds, key=lambda name: seconds[name]):
        gained = calls * (seconds["native"] - seconds[name])
        if seconds[name] < WORTH * seconds["native"] and first[name] - first["native"] < gained:
            return name
    return "native"


def make_inputs(transformer: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `(1, tokens, heads, channels)`, the same each time."""
    shape = (1, tokens, transformer.config.num_attention_heads, transformer.config.attention_head_dim)
    generator = torch.Generator("cpu").manual_seed(1)
    query, key, value = torch.randn(3, *shape, generator=generator).to(transformer.device, transformer.dtype)
    return query, key, value


def measure_seconds(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: AttentionBackendName
) -> float:
    """Seconds of one call, until the device has finished."""
    if query.is_cuda:
        torch.cuda.synchronize(query.device)
    start = time.perf_counter()
    dispatch_attention_fn(query, key, value, backend=backend)
    if query.is_cuda:
        torch.cuda.synchronize(query.device)
    return time.perf_counter() - start
