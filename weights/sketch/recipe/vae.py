"""The autoencoder: a convolutional decoder that inverts the linear code. (Its encoder is not trained yet.)

The decoder sees whole pictures as well as crops, because its group norms average over the whole picture; and slightly
noisy latents, because the transformer's are never exact.
"""

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from weights.sketch.recipe.atlas import Atlas
from weights.sketch.recipe.codec import CHANNELS, PATCH, Codec
from weights.sketch.recipe.data import TOKEN, make_scene, render
from weights.sketch.recipe.state import save_state

WIDTHS = (8, 16, 32, 64, 96, 96)
CROP = 128  # pixels
CROPS = 16
WHOLE = 0.2  # share of whole pictures
NOISE = 0.12  # largest standard deviation added to latents of unit variance
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
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    return vae.to(memory_format=torch.channels_last)


def sample(rng: np.random.Generator, atlas: Atlas, codec: Codec, late: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and pictures: crops, or one whole picture (in the late phase sometimes a large one)."""
    draw = rng.random()
    if draw >= WHOLE:
        pictures = [crop(rng, atlas) for _ in range(CROPS)]
    else:
        size = (16, 12) if late and draw < 0.1 else (8, 8)
        pictures = [render(make_scene(rng, *size), atlas)]
    latents = torch.stack([codec.encode(picture) for picture in pictures])
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1
    return latents, images.contiguous(memory_format=torch.channels_last)


def crop(rng: np.random.Generator, atlas: Atlas) -> np.ndarray:
    """A window of a scene of any size, mostly on its object."""
    tokens = int(rng.choice([8, 8, 8, 12, 16]))
    picture, size = render(make_scene(rng, tokens, tokens), atlas), tokens * TOKEN
    x, y = (int(np.clip(rng.normal(0.5, 0.2) * size - CROP / 2, 0, size - CROP)) // PATCH * PATCH for _ in range(2))
    return picture[y : y + CROP, x : x + CROP]


def train_decoder(
    out: Path,
    atlas: Atlas,
    codec: Codec,
    minutes: float,
    seed: int,
    device: str = "cpu",
    lr: float = 1e-3,
    warmup: int = 100,
    limit: int | None = None,
) -> list[float]:
    """Train the decoder for `minutes` in all (earlier runs counted in), or `limit` steps. Returns this run's losses."""
    vae = make_vae(seed).to(device)
    decoder = vae.decoder
    ema = copy.deepcopy(decoder.state_dict())
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    file, step, spent = out / "decoder.ckpt", 0, 0.0
    if file.exists():
        saved = torch.load(file, weights_only=True, map_location=device)
        decoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step, spent = saved["ema"], saved["step"], saved["spent"]
    rng = np.random.default_rng(seed + step)
    torch.manual_seed(seed + step)
    losses: list[float] = []
    start, saved_at = time.monotonic() - spent, time.monotonic()
    while (progress := (time.monotonic() - start) / 60 / minutes) < 1 and (limit is None or len(losses) < limit):
        latents, images = sample(rng, atlas, codec, late=progress > 0.6)
        latents = latents + torch.randn_like(latents) * torch.rand(len(latents), 1, 1, 1) * NOISE
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * min(1, 1.7 * (1 - progress)))
        with torch.autocast(device, torch.bfloat16):
            made = decoder(latents.to(device, memory_format=torch.channels_last))
        loss = (made.float() - images.to(device)).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in decoder.state_dict().items():
                ema[name].lerp_(value, 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            psnr = -10 * math.log10(np.mean(losses[-50:]) / 4)
            print(f"decoder step {step} progress {progress:.2f} psnr {psnr:.2f}", flush=True)
        if time.monotonic() - saved_at > 120:
            save_state(file, decoder, optimizer, ema, step, time.monotonic() - start)
            saved_at = time.monotonic()
    save_state(file, decoder, optimizer, ema, step, time.monotonic() - start)
    return losses
