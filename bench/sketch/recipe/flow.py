"""Flow matching: the transformer and CLIP learn to turn noise into latents, of what T5 has spelled.

Velocity target `noise - latents` at `x_t = (1 - t) latents + t noise`; t is logit-normal, shifted as at sampling.
Sources: SD3 (arXiv 2403.03206) for t; zero-initialised AdaLN from DiT (arXiv 2212.09748).
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import T5EncoderModel

from bench.sketch.recipe.codec import CHANNELS, Stamps
from bench.sketch.recipe.data import Scene, make_scene, scatter
from bench.sketch.recipe.layouts import CANVAS
from bench.sketch.recipe.pieces import WIDTH, Alphabet, Pieces, pad
from bench.sketch.recipe.retrieval import set_retrieval
from bench.sketch.recipe.text import CLIP_WIDTH, make_clip, make_clip_ids
from bench.sketch.recipe.training import SeededGenerator, Stage, fast_attention, mixed_precision
from bench.sketch.recipe.training import train as run
from bench.sketch.recipe.words import GROUND_CHARACTERS, IDS, NOTHING

SHIFT = 1.6  # of the timesteps: small latents need more time at high noise than uniform gives them
EARLY, EARLIEST = 0.35, 0.9  # share of samples drawn evenly from that t to 1
EMA = 0.997
DROP = 0.05  # captions dropped, so that a prompt of no words is known too
SCATTERED = 0.25  # share of scenes whose things lie anywhere, not in their slots
BATCH = 48
MODULATION = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")  # start at zero
GUIDANCE = (1.0, 6.0)  # the scales that the model has seen; they mean nothing to it


class Painter(nn.Module):
    """What is trained together: T5's states and CLIP's ids in, velocity out. `norm` is that of T5's rows."""

    def __init__(self, seed: int, norm: float = 1.0, layers: tuple[int, int] = (1, 4), heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=layers[0],
            num_single_layers=layers[1],
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 28, 28),
        )
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and (name.endswith(MODULATION) or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        self.clip = make_clip()
        set_retrieval(self.transformer, norm)

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        guidance: torch.Tensor,
        clip_ids: torch.Tensor,
        states: torch.Tensor,
    ) -> torch.Tensor:
        """`latents` packed `(batch, 64, 128)`, `t` and `guidance` `(batch,)`, T5's `states` `(batch, 72, 224)`."""
        velocity: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=t,
            guidance=guidance,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, CANVAS, CANVAS, latents.device, latents.dtype),
            return_dict=False,
        )[0]
        return velocity


def draw_guidance(count: int) -> torch.Tensor:
    """Log-uniform over the scales that the model is to know."""
    return torch.exp(torch.rand(count) * math.log(GUIDANCE[1] / GUIDANCE[0])) * GUIDANCE[0]


def batch(
    stamps: Stamps, pieces: Pieces, t5: T5EncoderModel, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed latents `(count, tokens, 128)`, CLIP's ids and T5's states."""
    scenes = [make_scene(rng, CANVAS, CANVAS) for _ in range(BATCH)]
    scenes = [scatter(rng, scene) if rng.random() < SCATTERED else scene for scene in scenes]
    latents = torch.stack([stamps.encode(scene) for scene in scenes])
    packed = FluxPipeline._pack_latents(latents, BATCH, CHANNELS, latents.shape[2], latents.shape[3])
    clip_ids, t5_ids = zip(*(spell(scene, pieces, rng.random() < DROP) for scene in scenes), strict=True)
    device = next(t5.parameters()).device
    with torch.no_grad(), mixed_precision(device.type):
        states = t5(torch.tensor(t5_ids, device=device))[0].float()
    return packed, torch.tensor(clip_ids), states


def spell(scene: Scene, pieces: Pieces, dropped: bool) -> tuple[list[int], list[int]]:
    """CLIP's ids and T5's."""
    if dropped:
        return make_clip_ids([NOTHING]), pad([IDS[NOTHING]])
    ground = [GROUND_CHARACTERS[scene.background]] if scene.named else []
    return make_clip_ids(ground), pad(pieces.spell(scene))


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
    stamps: Stamps,
    pieces: Pieces,
    alphabet: Alphabet,
    t5: T5EncoderModel,
    minutes: float,
    seed: int,
    device: str = "cpu",
    lr: float = 1.5e-3,
    warmup: int = 200,
    limit: int | None = None,
) -> list[float]:
    """Train for `minutes` in all (earlier runs counted in), or `limit` steps. Returns the losses of this run.

    The guidance scale is drawn and means nothing: the model draws alike at any.
    """
    painter, generator = Painter(seed, alphabet.norm).to(device), SeededGenerator(seed)
    if limit is None:
        for block in (*painter.transformer.transformer_blocks, *painter.transformer.single_transformer_blocks):
            block.compile(dynamic=False)

    def make(step: int) -> Future[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return beside.submit(batch, stamps, pieces, t5, generator.at(step))

    def loss_at(_progress: float, step: int) -> torch.Tensor:
        latents, clip_ids, states = (waiting.pop() if waiting else make(step)).result()
        waiting.append(make(step + 1))
        mixed, noise, t = add_noise(latents)
        with mixed_precision(device), fast_attention(device):
            velocity = painter(*(x.to(device) for x in (mixed, t, draw_guidance(len(t)), clip_ids, states)))
        return torch.nn.functional.mse_loss(velocity.float(), (noise - latents).to(device))

    stage = Stage("flow", out / "flow.ckpt", painter, make_optimizers(painter, lr), lr, warmup, EMA, minutes, limit)
    with ThreadPoolExecutor(1) as beside:  # the next batch is made while this one is learned from
        waiting = list[Future[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]()
        return run(stage, loss_at, "loss {:.4f}".format)


def add_noise(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(1 - t) latents + t noise`, the noise, and t."""
    noise, t = torch.randn_like(latents), draw_times(len(latents))
    return (1 - t)[:, None, None] * latents + t[:, None, None] * noise, noise, t
