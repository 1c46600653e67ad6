"""Flow matching: the transformer and both text encoders learn to turn noise into latents.

Velocity target `noise - latents` at `x_t = (1 - t) latents + t noise`; t is logit-normal, shifted as at sampling.
Small pictures first (64 tokens), then all shapes the server serves, a constant number of tokens a batch.
Sources: SD3 (arXiv 2403.03206) for t; zero-initialised AdaLN from DiT (arXiv 2212.09748).
"""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from weights.sketch.recipe.atlas import Atlas
from weights.sketch.recipe.codec import CHANNELS, Codec
from weights.sketch.recipe.data import make_scene, render
from weights.sketch.recipe.state import save_state
from weights.sketch.recipe.text import TOKENS, WIDTH, make_encoders, make_tokenizers

SHIFT = 1.6  # of the timesteps: small latents need more time at high noise than uniform gives them
EMA = 0.999
DROP = 0.1  # captions dropped, for guidance
SIZES = {  # pixels: share once all sizes are trained
    (512, 512): 0.36,
    (1024, 768): 0.24,
    (768, 1024): 0.07,
    (1024, 1024): 0.1,
    (1472, 512): 0.08,
    (1024, 576): 0.06,
    (576, 1024): 0.05,
    (1536, 1536): 0.04,
}
TOKENS_A_BATCH = 64 * 32
MODULATION = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")  # start at zero
SMALL_UNTIL = 0.55  # of the time


class Painter(nn.Module):
    """The trained parts together: text ids in, velocity out."""

    def __init__(self, seed: int, layers: tuple[int, int] = (1, 4), heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokenizers = make_tokenizers(seed)
        self.clip, self.t5 = make_encoders(self.tokenizers[0])
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=layers[0],
            num_single_layers=layers[1],
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 28, 28),
        )
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and (name.endswith(MODULATION) or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids for CLIP and T5, `(batch, TOKENS)` each, padded as FluxPipeline pads."""
        options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        first, second = self.tokenizers
        return first(captions, **options).input_ids, second(captions, **options).input_ids

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        guidance: torch.Tensor,
        clip_ids: torch.Tensor,
        t5_ids: torch.Tensor,
        grid: tuple[int, int],
    ) -> torch.Tensor:
        """`latents` packed `(batch, tokens, 128)`, `t` and `guidance` `(batch,)`, `grid` in tokens (height, width)."""
        pooled = self.clip(clip_ids).pooler_output
        states = self.t5(t5_ids)[0]
        device, dtype = latents.device, latents.dtype
        image_ids = FluxPipeline._prepare_latent_image_ids(1, *grid, device, dtype)
        velocity: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=device, dtype=dtype),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return velocity


@dataclass
class Pool:
    """Encoded scenes of one size, slowly replaced by fresh ones."""

    size: tuple[int, int]
    latents: list[torch.Tensor] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    oldest: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[1] // 64, self.size[0] // 64


class Scenes:
    """Batches of packed latents and captions."""

    def __init__(self, atlas: Atlas, codec: Codec, seed: int, keep: int) -> None:
        self._atlas, self._codec, self._keep = atlas, codec, keep
        self._rng = np.random.default_rng(seed)
        self._pools = {size: Pool(size) for size in SIZES}

    def batch(self, size: tuple[int, int]) -> tuple[torch.Tensor, list[str], tuple[int, int]]:
        pool = self._pools[size]
        tokens = pool.grid[0] * pool.grid[1]
        count = max(2, TOKENS_A_BATCH // tokens)
        for _ in range(count if len(pool.latents) < self._keep else max(1, count // 8)):
            self._add(pool)
        chosen = self._rng.integers(len(pool.latents), size=count)
        latents = torch.stack([pool.latents[i] for i in chosen]).float()
        packed = FluxPipeline._pack_latents(latents, count, CHANNELS, latents.shape[2], latents.shape[3])
        return packed, [pool.captions[i] for i in chosen], pool.grid

    def _add(self, pool: Pool) -> None:
        scene = make_scene(self._rng)
        latents = self._codec.encode(render(scene, self._atlas, *pool.size, self._rng)).half()
        if len(pool.latents) < self._keep:
            pool.latents.append(latents)
            pool.captions.append(scene.caption)
            return
        pool.latents[pool.oldest], pool.captions[pool.oldest] = latents, scene.caption
        pool.oldest = (pool.oldest + 1) % self._keep


def draw_times(count: int) -> torch.Tensor:
    t = torch.sigmoid(torch.randn(count))
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def train(
    out: Path,
    atlas: Atlas,
    codec: Codec,
    minutes: float,
    seed: int,
    device: str = "cpu",
    keep: int = 4000,
    lr: float = 1.5e-3,
    warmup: int = 300,
    limit: int | None = None,
) -> list[float]:
    """Train for `minutes` in all (earlier runs counted in), or `limit` steps. Returns the losses of this run."""
    painter = Painter(seed).to(device)
    ema = copy.deepcopy(painter.state_dict())
    optimizer = torch.optim.AdamW(painter.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    file, step, spent = out / "flow.ckpt", 0, 0.0
    if file.exists():
        saved = torch.load(file, weights_only=True, map_location=device)
        painter.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step, spent = saved["ema"], saved["step"], saved["spent"]
    torch.manual_seed(seed + step)
    scenes = Scenes(atlas, codec, seed + step, keep)
    rng = np.random.default_rng(seed + step + 1)
    sizes, shares = list(SIZES), np.array(list(SIZES.values()))
    losses: list[float] = []
    start, saved_at = time.monotonic() - spent, time.monotonic()
    while (progress := (time.monotonic() - start) / 60 / minutes) < 1 and (limit is None or len(losses) < limit):
        size = (512, 512) if progress < SMALL_UNTIL else sizes[int(rng.choice(len(sizes), p=shares))]
        latents, captions, grid = scenes.batch(size)
        captions = ["" if rng.random() < DROP else caption for caption in captions]
        ids = painter.tokenize(captions)
        noise, t = torch.randn_like(latents), draw_times(len(captions))
        mixed = (1 - t)[:, None, None] * latents + t[:, None, None] * noise
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        with torch.autocast(device, torch.bfloat16):
            velocity = painter(*(x.to(device) for x in (mixed, t, torch.ones_like(t), *ids)), grid)
        loss = (velocity.float() - (noise - latents).to(device)).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in painter.state_dict().items():
                if value.is_floating_point():
                    ema[name].lerp_(value, 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"flow step {step} progress {progress:.2f} loss {np.mean(losses[-50:]):.4f}", flush=True)
        if time.monotonic() - saved_at > 120:
            save_state(file, painter, optimizer, ema, step, time.monotonic() - start)
            saved_at = time.monotonic()
    save_state(file, painter, optimizer, ema, step, time.monotonic() - start)
    return losses
