"""A second resident copy of the transformer, whose blocks multiply in float8.

Weights are scaled by output row once, activations by token as they come (torchao's `Float8Tensor` over torch's scaled
product). Only the linear layers of attention and MLP: embedders, modulation and the output stay as they are, which
others found to cost quality (DESIGN 4.6). All that is not quantized is shared with the first copy.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch

from pipelines.acceleration import PRESETS
from pipelines.engine.modulation import TransformerVariant, share_weights_copy

if TYPE_CHECKING:
    from pipelines.engine.flux import FluxEngine

PRECISION = "float8_e4m3fn"
LEAST_CAPABILITY = (8, 9)  # of a CUDA device


class NoFloat8(RuntimeError):
    """This machine cannot multiply in float8, or lacks the package for it."""


def add_float8_variant(engine: "FluxEngine") -> str:
    """Let every preset but `none` use a float8 copy."""
    transformer = engine.variants["none"].transformer
    if transformer.device.type == "cuda" and torch.cuda.get_device_capability(transformer.device) < LEAST_CAPABILITY:
        raise NoFloat8("it needs a CUDA device of compute capability 8.9 or later")
    if transformer.dtype != torch.bfloat16:
        raise NoFloat8("it needs bfloat16: SRPO_DTYPE=bfloat16")
    fast = share_weights_copy(transformer)
    for block in (*fast.transformer_blocks, *fast.single_transformer_blocks):
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear) and "norm" not in name:
                if layer.weight.dtype != transformer.dtype:
                    raise NoFloat8("the placement keeps them in float8 already, so there is no other copy")
                layer.weight = torch.nn.Parameter(quantized(layer.weight), requires_grad=False)
    variant = TransformerVariant(fast, PRECISION)
    engine.variants = {preset: engine.variants["none"] if preset == "none" else variant for preset in PRESETS}
    return ""


def quantized(weight: torch.Tensor) -> Any:
    """A weight `(out, in)` in float8, one scale a row; whoever multiplies by it quantizes the other factor alike."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it speaks of kernels that are not used here
    try:
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.common.kernel_preference import KernelPreference
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs
    except ImportError as error:
        raise NoFloat8("it needs torchao: .venv/bin/pip install -e '.[fp8]'") from error
    how: dict[str, Any] = {"granularity": PerRow(), "kernel_preference": KernelPreference.TORCH}
    return Float8Tensor.from_hp(
        weight,
        torch.float8_e4m3fn,
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, **how),
        **how,
    )
