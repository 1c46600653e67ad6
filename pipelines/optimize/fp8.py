"""A second copy of the transformer in memory, whose blocks multiply in float8.

Weights are scaled by output row once, activations by token in every step (torchao's `Float8Tensor` over torch's scaled
product). Only the linear layers of attention and MLP are quantized: quantizing embedders, modulation and the output
layer is known to cost quality. All that is not quantized is shared with the first copy.
"""

import logging
from dataclasses import replace
from typing import Any

import torch

from pipelines.acceleration import PRESETS
from pipelines.engine.flux import FluxEngine
from pipelines.engine.modulation import TransformerVariant, share_weights_copy
from pipelines.engine.options import EngineOptions
from pipelines.optimize.context import Change, OptimizationContext

PRECISION = "float8_e4m3fn"
MIN_CAPABILITY = (8, 9)  # of a CUDA device


class Float8Unavailable(RuntimeError):
    """This machine cannot multiply in float8, or lacks the package for it."""


def add_float8_variant(engine: FluxEngine, _: OptimizationContext) -> Change:
    """Let every preset but `none` use a float8 copy."""
    transformer = engine.variants["none"].transformer
    if transformer.device.type == "cuda" and torch.cuda.get_device_capability(transformer.device) < MIN_CAPABILITY:
        raise Float8Unavailable("it needs a CUDA device of compute capability 8.9 or later")
    if transformer.dtype != torch.bfloat16:
        raise Float8Unavailable("it needs bfloat16: SRPO_DTYPE=bfloat16")
    fast = share_weights_copy(transformer)
    for block in (*fast.transformer_blocks, *fast.single_transformer_blocks):
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear) and "norm" not in name:
                if layer.weight.dtype != transformer.dtype:
                    raise Float8Unavailable("the placement keeps them in float8 already, so there is no other copy")
                layer.weight = torch.nn.Parameter(quantize(layer.weight), requires_grad=False)
    variant = TransformerVariant(fast, PRECISION)
    variants = {preset: engine.variants["none"] if preset == "none" else variant for preset in PRESETS}
    return Change(replace(engine.options, variants=variants))


def remove_float8_variant(engine: FluxEngine) -> EngineOptions:
    """Let every preset use the transformer of `none` again."""
    return replace(engine.options, variants=dict.fromkeys(PRESETS, engine.variants["none"]))


def quantize(weight: torch.Tensor) -> Any:
    """A weight `(out, in)` in float8 with one scale a row; a product with it quantizes the other factor, too."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels that are not used here
    try:
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs
    except ImportError as error:
        raise Float8Unavailable("it needs torchao: .venv/bin/pip install -e '.[fp8]'") from error
    how: dict[str, Any] = {"granularity": PerRow(), "kernel_preference": KernelPreference.TORCH}
    return Float8Tensor.from_hp(
        weight,
        torch.float8_e4m3fn,
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, **how),
        **how,
    )
