"""Linear layers that keep their weight in float8 with a scale a row, and compute as before.

Half the memory of bfloat16, on every device: the weight is made wide again for the one product it takes part in. The
values are those of `srpo weights convert --to fp8`. Imports torch.
"""

from typing import Any

import torch

from weights.formats.architecture import LINEARS
from weights.formats.write import FP8, quantized


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


def narrow(model: torch.nn.Module) -> None:
    """Put such layers in the place of the blocks' own. On the meta device: contents are not kept."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and LINEARS.fullmatch(f"{name}.weight"):
            model.set_submodule(name, Float8Linear(layer.in_features, layer.out_features, layer.bias is not None))


def stored(name: str, values: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """A tensor of the transformer as `narrow`'s layers keep it; what is no block's weight in `dtype`."""
    if not LINEARS.fullmatch(name):
        return {name: values.to(dtype)}
    weight, scale = quantized(values)
    return {name: weight, f"{name}_scale": scale}
