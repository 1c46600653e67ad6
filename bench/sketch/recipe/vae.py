"""The autoencoder: a convolutional decoder that learns to invert the linear code. `encoder` sets its other half.

The decoder sees whole pictures as well as crops, because its group norms average over the whole picture; and slightly
noisy latents, because the transformer's are never exact.
"""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from bench.sketch.recipe.atlas import Atlas
from bench.sketch.recipe.codec import CHANNELS, PATCH, Codec
from bench.sketch.recipe.concepts import BACKGROUNDS
from bench.sketch.recipe.data import TOKEN, make_scene, pick, render
from bench.sketch.recipe.training import Muon, SeededGenerator, Stage, mixed_precision, train

WIDTHS = (8, 16, 32, 64, 128, 128)
GROUPS = 1  # with a channel a group, a plain colour would be normalised away
CROP = 128  # pixels
CROPS = 16
WHOLE = 0.15  # share of whole pictures
NOISE = 0.1  # largest standard deviation added to latents of unit variance
EMA = 0.998


def make_vae(seed: int) -> AutoencoderKL:
    """FLUX's autoencoder class, 32 pixels a latent; scale 1 and shift 0, since the code is normalised already."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=GROUPS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return vae.to(memory_format=torch.channels_last)


def sample(rng: np.random.Generator, atlas: Atlas, codec: Codec, late: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and pictures: crops, or one whole picture (in the late phase sometimes a large one)."""
    draw = rng.random()
    if draw >= WHOLE:
        pictures = [crop(rng, atlas) for _ in range(CROPS)]
    else:
        size = (16, 8) if late and draw < 0.1 else (8, 8)
        pictures = [render(make_scene(rng, *size), atlas)]
    latents = torch.stack([codec.encode(picture) for picture in pictures])
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1
    return latents, images.contiguous(memory_format=torch.channels_last)


def crop(rng: np.random.Generator, atlas: Atlas) -> np.ndarray:
    """A window on one object, on the latents' grid; drawn alone, since a whole scene costs ten times as much."""
    while not (things := make_scene(rng).things):
        continue
    thing = things[0]
    side, ground = thing.side * TOKEN, pick(rng, list(BACKGROUNDS)) if rng.random() < 0.55 else "white"
    x, y = (int(rng.integers(-CROP // 2, side - CROP // 2)) // PATCH * PATCH for _ in range(2))
    window = np.empty((CROP, CROP, 3), dtype=np.float32)
    window[:] = np.array(BACKGROUNDS[ground], dtype=np.float32) / 255
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + CROP, side), min(y + CROP, side)
    picture = atlas.picture(thing.concept, thing.colour, side)[top:bottom, left:right]
    spot = window[top - y : bottom - y, left - x : right - x]
    spot *= 1 - picture[..., 3:]
    spot += picture[..., :3]
    return window


def train_decoder(
    out: Path,
    atlas: Atlas,
    codec: Codec,
    minutes: float,
    seed: int,
    device: str = "cpu",
    lr: float = 2e-3,
    warmup: int = 100,
    limit: int | None = None,
) -> list[float]:
    """Train the decoder for `minutes` in all (earlier runs counted in), or `limit` steps. Returns this run's losses."""
    decoder = make_vae(seed).to(device).decoder
    kernels = [value for value in decoder.parameters() if value.ndim == 4]
    rest = [value for value in decoder.parameters() if value.ndim != 4]
    optimizers = [Muon(kernels, lr), torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.0)]
    generator = SeededGenerator(seed)

    def loss_at(progress: float, step: int) -> torch.Tensor:
        latents, images = sample(generator.at(step), atlas, codec, late=progress > 0.6)
        latents = latents + torch.randn_like(latents) * torch.rand(len(latents), 1, 1, 1) * NOISE
        with mixed_precision(device):
            made = decoder(latents.to(device, memory_format=torch.channels_last))
        loss: torch.Tensor = (made.float() - images.to(device)).pow(2).mean()
        return loss

    stage = Stage("decoder", out / "decoder.ckpt", decoder, optimizers, lr, warmup, EMA, minutes, limit)
    return train(stage, loss_at, lambda loss: f"psnr {-10 * math.log10(loss / 4):.2f}")
