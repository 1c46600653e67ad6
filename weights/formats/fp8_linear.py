"""Linear layers that store their weight in float8, with a scale for each row. Imports torch.

They need half the memory of bfloat16 on every device: each forward dequantizes the weight for its own product only. The
values are those that `srpo weights convert --to fp8` writes.
"""

from typing import Any

import torch

from weights.formats.architecture import BLOCK_LINEARS
from weights.formats.write import FP8, quantize_rows


class Float8Linear(torch.nn.Linear):
    """A linear layer whose weight is `weight` `(out, in)` in float8 times `weight_scale` `(out, 1)` in float32."""

    weight_scale: torch.Tensor

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.weight = torch.nn.Parameter(self.weight.to(FP8), requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(outputs, 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(input.dtype).mul_(self.weight_scale)  # rounded once
        return torch.nn.functional.linear(input, weight, self.bias)


def use_float8_linears(model: torch.nn.Module) -> None:
    """Replace the linear layers of the blocks. The model is on the meta device: weights are not converted."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and BLOCK_LINEARS.fullmatch(f"{name}.weight"):
            model.set_submodule(name, Float8Linear(layer.in_features, layer.out_features, layer.bias is not None))


def float8_state(name: str, values: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The entries of the state dict for one tensor: fp8 and its scale for a block's matrix, else in `dtype`."""
    if not BLOCK_LINEARS.fullmatch(name):
        return {name: values.to(dtype)}
    weight, scale = quantize_rows(values)
    return {name: weight, f"{name}_scale": scale}
