"""The autoencoder's encoder, set and not trained: its convolutions are given the linear code's own arithmetic.

Each level keeps the principal components of its 2x2 neighbourhoods, the last one the code itself by least squares.
Residual branches are zero. What is left in the way are the last norm and its activation: channels of a large constant
hold the norm's scale still, and `silu(x) - silu(-x) = x` makes the activation linear.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL

from bench.sketch.recipe.atlas import Atlas
from bench.sketch.recipe.codec import CHANNELS, Codec
from bench.sketch.recipe.data import make_scene, render

SCENES = 48
ANCHOR = 256.0  # against latents of unit variance: the norm's scale moves by a few parts in 100,000
CERTAIN = -30.0  # log variance: diffusers' lower bound


@torch.no_grad()
def set_encoder(vae: AutoencoderKL, atlas: Atlas, codec: Codec, seed: int) -> None:
    """Make `vae.encode` the linear code, for every picture alike."""
    encoder, rng = vae.encoder, np.random.default_rng(seed)
    pictures = [render(make_scene(rng), atlas) for _ in range(SCENES)]
    codes = torch.stack([codec.encode(picture) for picture in pictures])
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            for value in module.parameters():
                value.zero_()
            if name == "conv_in" or name.endswith("conv_shortcut"):
                centre = module.kernel_size[0] // 2
                for channel in range(module.in_channels):
                    module.weight[channel, channel, centre, centre] = 1
    levels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1
    halvings = [block.downsamplers[0].conv for block in encoder.down_blocks if block.downsamplers]
    for conv in halvings[:-1]:
        levels = keep_components(conv, levels)
    keep_code(halvings[-1], levels, codes)
    norm, out = encoder.conv_norm_out, encoder.conv_out
    anchored = 1 - 2 * CHANNELS / norm.num_channels
    norm.weight.fill_(ANCHOR * anchored**0.5)
    norm.bias.zero_()
    for channel in range(CHANNELS):
        out.weight[channel, channel, 1, 1] = 1
        out.weight[channel, CHANNELS + channel, 1, 1] = -1
    out.bias[CHANNELS:] = CERTAIN


def neighbourhoods(levels: torch.Tensor) -> torch.Tensor:
    """`(n, c, 2h, 2w)` to `(n h w, 4 c)`, in the order channel, row, column."""
    n, c, h, w = levels.shape
    return levels.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4 * c).double()


def set_taps(conv: torch.nn.Conv2d, matrix: torch.Tensor, channels: int) -> None:
    """Rows of `(outputs, 4 channels)` as the four taps of a stride-2 convolution that see one neighbourhood."""
    conv.weight[: len(matrix), :channels, :2, :2] = matrix.reshape(len(matrix), channels, 2, 2).to(conv.weight)


def keep_components(conv: torch.nn.Conv2d, levels: torch.Tensor) -> torch.Tensor:
    """Give `conv` the principal components of the neighbourhoods; returns the next, halved level."""
    around = neighbourhoods(levels)
    kept = min(conv.out_channels, around.shape[1])
    _, vectors = torch.linalg.eigh(around.T @ around)
    basis = vectors[:, -kept:].T
    set_taps(conv, basis, levels.shape[1])
    n, _, h, w = levels.shape
    halved: torch.Tensor = (around @ basis.T).float().view(n, h // 2, w // 2, kept)
    return halved.permute(0, 3, 1, 2)


def keep_code(conv: torch.nn.Conv2d, levels: torch.Tensor, codes: torch.Tensor) -> None:
    """Give `conv` the code, the code negated, and the anchors."""
    around = neighbourhoods(levels)
    around = torch.cat([around, torch.ones_like(around[:, :1])], dim=1)
    wanted = codes.permute(0, 2, 3, 1).reshape(-1, CHANNELS).double()
    ridge = 1e-9 * len(around) * torch.eye(around.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(around.T @ around + ridge, around.T @ wanted).T
    matrix, bias = solution[:, :-1], solution[:, -1].float()
    set_taps(conv, torch.cat([matrix, -matrix]), levels.shape[1])
    anchors = conv.out_channels - 2 * CHANNELS
    signs = torch.tensor([ANCHOR, -ANCHOR]).repeat(anchors // 2)
    assert conv.bias is not None
    conv.bias.copy_(torch.cat([bias, -bias, signs]))
