"""Convolutions in bfloat16 at a bearable pace, where the CPU has no instructions for it.

torch has only a plain loop for them there: 97 % of a tiny picture's time, and minutes of the suite.
"""

import torch
from torch import Tensor, nn


def forward(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32, rounded at the end. Repeatable like torch's own, which is all that a comparison needs."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return plain(layer, x, weight, bias)
    return plain(layer, x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()


plain = nn.Conv2d._conv_forward
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    nn.Conv2d._conv_forward = forward  # type: ignore[assignment,method-assign]
