"""Flow matching: the transformer and both text encoders learn to turn noise into latents.

Velocity target `noise - latents` at `x_t = (1 - t) latents + t noise`; t is logit-normal, shifted as at sampling.
Small pictures first (64 tokens), then all shapes the server serves, a constant number of tokens a batch.
Sources: SD3 (arXiv 2403.03206) for t; zero-initialised AdaLN from DiT (arXiv 2212.09748).
"""

import copy
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from weights.sketch.recipe.atlas import Atlas
from weights.sketch.recipe.codec import CHANNELS, Codec, Stamps
from weights.sketch.recipe.data import TOKEN, make_scene
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
COOLDOWN = 0.25  # of the time, in which the learning rate falls in a line; a longer run may so resume an ended one's


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


def batch(
    stamps: Stamps, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[torch.Tensor, list[str], tuple[int, int]]:
    """Packed latents `(count, tokens, 128)`, captions (a tenth of them dropped) and the grid in tokens."""
    width, height = size[0] // TOKEN, size[1] // TOKEN
    count = max(2, TOKENS_A_BATCH // (width * height))
    scenes = [make_scene(rng, width, height) for _ in range(count)]
    latents = torch.stack([stamps.encode(scene) for scene in scenes])
    packed = FluxPipeline._pack_latents(latents, count, CHANNELS, latents.shape[2], latents.shape[3])
    captions = ["" if rng.random() < DROP else scene.caption for scene in scenes]
    return packed, captions, (height, width)


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
    stamps, rng = Stamps(atlas, codec), np.random.default_rng(seed + step)
    sizes, shares = list(SIZES), np.array(list(SIZES.values()))
    losses: list[float] = []
    start, saved_at = time.monotonic() - spent, time.monotonic()
    while (progress := (time.monotonic() - start) / 60 / minutes) < 1 and (limit is None or len(losses) < limit):
        size = (512, 512) if progress < SMALL_UNTIL else sizes[int(rng.choice(len(sizes), p=shares))]
        latents, captions, grid = batch(stamps, rng, size)
        ids = painter.tokenize(captions)
        noise, t = torch.randn_like(latents), draw_times(len(captions))
        mixed = (1 - t)[:, None, None] * latents + t[:, None, None] * noise
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup, 0.02 + (1 - progress) / COOLDOWN)
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
