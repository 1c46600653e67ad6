"""Flow matching: the transformer and both text encoders learn to turn noise into latents.

Velocity target `noise - latents` at `x_t = (1 - t) latents + t noise`; t is logit-normal, shifted as at sampling.
Sources: SD3 (arXiv 2403.03206) for t; zero-initialised AdaLN from DiT (arXiv 2212.09748).
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from bench.sketch.recipe.atlas import Atlas
from bench.sketch.recipe.codec import CHANNELS, Codec, Stamps
from bench.sketch.recipe.data import TOKEN, Scene, make_scene
from bench.sketch.recipe.text import WIDTH, make_encoders, make_ids
from bench.sketch.recipe.training import SeededGenerator, Stage, fast_attention, load_averaged_weights, mixed_precision
from bench.sketch.recipe.training import train as run
from bench.sketch.recipe.words import NOTHING

SHIFT = 1.6  # of the timesteps: small latents need more time at high noise than uniform gives them
EARLY, EARLIEST = 0.35, 0.9  # share of samples drawn evenly from that t to 1
EMA = 0.997
DROP = 0.05  # captions dropped, for guidance
SIZES = {(512, 512): 1.0}  # pixels: share. One so far: a second size was learned almost anew
TOKENS_A_BATCH = 64 * 64
MODULATION = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")  # start at zero
GUIDANCE = (1.0, 6.0)  # the scales that the distilled model knows


class Painter(nn.Module):
    """The trained parts together: ids of words in, velocity out."""

    def __init__(self, seed: int, layers: tuple[int, int] = (1, 4), heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.clip, self.t5 = make_encoders()
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

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        guidance: torch.Tensor,
        clip_ids: torch.Tensor,
        t5_ids: torch.Tensor,
        image_ids: torch.Tensor,
    ) -> torch.Tensor:
        """`latents` packed `(batch, tokens, 128)`, `t` and `guidance` `(batch,)`, `image_ids` `(tokens, 3)`."""
        pooled = self.clip(clip_ids).pooler_output
        states = self.t5(t5_ids)[0]
        device, dtype = latents.device, latents.dtype
        velocity: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=device, dtype=dtype),
            img_ids=image_ids.to(device, dtype),
            return_dict=False,
        )[0]
        return velocity


def tokenize(prompts: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids for CLIP and T5, `(prompts, TOKENS)` each."""
    clip, t5 = zip(*(make_ids(words) for words in prompts), strict=True)
    return torch.tensor(clip), torch.tensor(t5)


def draw_guidance(count: int) -> torch.Tensor:
    """Log-uniform over the scales that the model is to know."""
    return torch.exp(torch.rand(count) * math.log(GUIDANCE[1] / GUIDANCE[0])) * GUIDANCE[0]


def batch(
    stamps: Stamps, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[torch.Tensor, list[Scene], torch.Tensor]:
    """Packed latents `(count, tokens, 128)`, scenes, and the tokens' position ids `(tokens, 3)`."""
    width, height = size[0] // TOKEN, size[1] // TOKEN
    count = max(2, TOKENS_A_BATCH // (width * height))
    scenes = [make_scene(rng, width, height) for _ in range(count)]
    latents = torch.stack([stamps.encode(scene) for scene in scenes])
    packed = FluxPipeline._pack_latents(latents, count, CHANNELS, latents.shape[2], latents.shape[3])
    ids = FluxPipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), torch.float32)
    return packed, scenes, ids


def make_optimizers(painter: Painter, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, at AdamW's step size (arXiv 2502.16982); AdamW for the rest.

    Measured: as far after 277 steps as AdamW alone after 368.
    """
    blocks = {
        name: value
        for name, value in painter.transformer.named_parameters()
        if value.ndim == 2 and "transformer_blocks" in name
    }
    rest = [value for name, value in painter.named_parameters() if name.removeprefix("transformer.") not in blocks]
    return [
        torch.optim.Muon(blocks.values(), lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def draw_times(count: int) -> torch.Tensor:
    """Logit-normal and shifted, and a share of nearly pure noise.

    Only there must the text say what the whole picture is: by t = 0.97 its background and layout shine through the
    noise, and logit-normal draws come that near in one of three hundred.
    """
    t = torch.sigmoid(torch.randn(count))
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    return torch.where(torch.rand(count) < EARLY, 1 - (1 - EARLIEST) * torch.rand(count), t)


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
    prepare: Callable[[Painter], None] | None = None,
) -> list[float]:
    """Train for `minutes` in all (earlier runs counted in), or `limit` steps. Returns the losses of this run.

    `prepare` sets a fresh model's weights. The guidance scale is drawn and means nothing yet: a model that is not
    distilled draws alike at any.
    """
    painter = Painter(seed).to(device)
    if prepare is not None and not (out / "flow.ckpt").exists():
        prepare(painter)
    stamps, generator = Stamps(atlas, codec), SeededGenerator(seed)

    def loss_at(_progress: float, step: int) -> torch.Tensor:
        rng = generator.at(step)
        latents, scenes, image_ids = batch(stamps, rng, draw_size(rng))
        ids = tokenize([[NOTHING] if rng.random() < DROP else scene.words for scene in scenes])
        mixed, noise, t = add_noise(latents)
        with mixed_precision(device), fast_attention(device):
            velocity = painter(*(x.to(device) for x in (mixed, t, draw_guidance(len(t)), *ids)), image_ids)
        return torch.nn.functional.mse_loss(velocity.float(), (noise - latents).to(device))

    stage = Stage("flow", out / "flow.ckpt", painter, make_optimizers(painter, lr), lr, warmup, EMA, minutes, limit)
    return run(stage, loss_at, "loss {:.4f}".format)


def distil(
    out: Path,
    atlas: Atlas,
    codec: Codec,
    minutes: float,
    seed: int,
    device: str = "cpu",
    lr: float = 5e-4,
    warmup: int = 50,
    limit: int | None = None,
) -> list[float]:
    """Guidance distillation (arXiv 2210.03142): one pass learns what classifier-free guidance needs two for.

    The student starts as the teacher and is told the scale w, log-uniform from 1 to 6. Its target is
    `v(nothing) + w (v(caption) - v(nothing))`, from `EARLIEST` on that of the caption alone: guided there, whole
    pictures turn out too bright or too dark (arXiv 2404.07724).
    """
    teacher = Painter(seed).to(device)
    teacher.load_state_dict(load_averaged_weights(out / "flow.ckpt"))
    student = copy.deepcopy(teacher)
    teacher.eval().requires_grad_(False)
    stamps, generator = Stamps(atlas, codec), SeededGenerator(seed + 1)

    def loss_at(_progress: float, step: int) -> torch.Tensor:
        rng = generator.at(step)
        latents, scenes, image_ids = batch(stamps, rng, draw_size(rng))
        mixed, _, t = add_noise(latents)
        scale = draw_guidance(len(t))
        inputs = [x.to(device) for x in (mixed, t, torch.ones_like(t), *tokenize([scene.words for scene in scenes]))]
        nothing = [x.to(device) for x in tokenize([[NOTHING]] * len(scenes))]
        with mixed_precision(device), fast_attention(device):
            free = teacher(*inputs[:3], *nothing, image_ids).float()
            bound = teacher(*inputs, image_ids).float()
            velocity = student(*inputs[:2], scale.to(device), *inputs[3:], image_ids)
        weight = torch.where(t < EARLIEST, scale, 1.0).to(device)
        target = free + weight[:, None, None] * (bound - free)
        return torch.nn.functional.mse_loss(velocity.float(), target)

    optimizers = make_optimizers(student, lr)
    stage = Stage("guidance", out / "guidance.ckpt", student, optimizers, lr, warmup, 0.99, minutes, limit)
    return run(stage, loss_at, "loss {:.4f}".format)


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    return list(SIZES)[int(rng.choice(len(SIZES), p=list(SIZES.values())))]


def add_noise(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(1 - t) latents + t noise`, the noise, and t."""
    noise, t = torch.randn_like(latents), draw_times(len(latents))
    return (1 - t)[:, None, None] * latents + t[:, None, None] * noise, noise, t
