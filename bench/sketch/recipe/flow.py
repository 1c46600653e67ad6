"""Flow matching: the transformer and CLIP learn to turn noise into latents, of what T5 has spelled.

Velocity target `noise - latents` at `x_t = (1 - t) latents + t noise`; t is logit-normal, shifted as at sampling.
Sources: SD3 (arXiv 2403.03206) for t; zero-initialised AdaLN from DiT (arXiv 2212.09748).
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from bench.sketch.recipe.codec import CHANNELS, Stamps
from bench.sketch.recipe.data import Scene, make_scene, pick, scatter
from bench.sketch.recipe.layouts import CANVAS, WINDOWS, window_start
from bench.sketch.recipe.pieces import WIDTH, Alphabet, Pieces, pad
from bench.sketch.recipe.retrieval import set_retrieval
from bench.sketch.recipe.text import CLIP_WIDTH, make_clip, make_clip_ids
from bench.sketch.recipe.training import Muon, SeededGenerator, Stage, fast_attention, mixed_precision
from bench.sketch.recipe.training import train as run
from bench.sketch.recipe.words import GROUND_CHARACTERS, IDS, NOTHING, TOKENS

SHIFT = 1.6  # of the timesteps: small latents need more time at high noise than uniform gives them
EARLY, EARLIEST = 0.35, 0.9  # share of samples drawn evenly from that t to 1
EMA = 0.997
RATE, LATER_RATE = 1.5e-3, 1e-3  # of learning: from nothing, from an earlier edition
DROP = 0.05  # captions dropped, so that a prompt of no words is known too
SCATTERED = 0.25  # share of scenes whose things lie anywhere, not in their slots
BATCH = 48  # scenes of the canvas' shape; fewer of a longer one
SQUARE = 0.4  # share of batches of the canvas' shape; the others are even
Window = tuple[int, int]  # width and height in tokens
MODULATION = (".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")  # start at zero
GUIDANCE = (1.0, 6.0)  # the scales that the model has seen; they mean nothing to it


class Batch(NamedTuple):
    """Scenes of one shape: packed latents `(count, tokens, 128)`, CLIP's ids, T5's states, the shape in tokens."""

    latents: torch.Tensor
    clip_ids: torch.Tensor
    states: torch.Tensor
    window: Window


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

    def load_edition(self, folder: Path) -> None:
        """Take over the weights of an edition's folder."""
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", local_files_only=True)
        self.transformer.load_state_dict(transformer.state_dict())
        clip = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True)
        self.clip.load_state_dict(clip.state_dict())

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        guidance: torch.Tensor,
        clip_ids: torch.Tensor,
        states: torch.Tensor,
        window: Window = (CANVAS, CANVAS),
    ) -> torch.Tensor:
        """`latents` packed `(batch, tokens, 128)`, `t` and `guidance` `(batch,)`, T5's `states` `(batch, 72, 224)`.

        `window` is the pictures' shape in tokens.
        """
        velocity: torch.Tensor = self.transformer(
            hidden_states=latents,
            timestep=t,
            guidance=guidance,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=make_ids(window).to(latents),
            return_dict=False,
        )[0]
        return velocity


def make_ids(window: Window) -> torch.Tensor:
    """Position ids `(tokens, 3)`, counted from the canvas' first row and column."""
    width, height = window
    ids: torch.Tensor = FluxPipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), torch.float32)
    return ids + torch.tensor([0, window_start(height), window_start(width)])


def pick_window(rng: np.random.Generator) -> Window:
    return WINDOWS[0] if rng.random() < SQUARE else pick(rng, WINDOWS[1:])


def draw_guidance(count: int) -> torch.Tensor:
    """Log-uniform over the scales that the model is to know."""
    return torch.exp(torch.rand(count) * math.log(GUIDANCE[1] / GUIDANCE[0])) * GUIDANCE[0]


def batch(stamps: Stamps, pieces: Pieces, t5: T5EncoderModel, rng: np.random.Generator) -> Batch:
    window = pick_window(rng)
    count = max(1, BATCH * (CANVAS**2 + TOKENS) // (window[0] * window[1] + TOKENS))
    scenes = [make_scene(rng, *window) for _ in range(count)]
    scenes = [scatter(rng, scene) if rng.random() < SCATTERED else scene for scene in scenes]
    latents = torch.stack([stamps.encode(scene) for scene in scenes])
    packed = FluxPipeline._pack_latents(latents, count, CHANNELS, latents.shape[2], latents.shape[3])
    clip_ids, t5_ids = zip(*(spell(scene, pieces, rng.random() < DROP) for scene in scenes), strict=True)
    device = next(t5.parameters()).device
    with torch.no_grad(), mixed_precision(device.type):
        states = t5(torch.tensor(t5_ids, device=device))[0].float()
    return Batch(packed, torch.tensor(clip_ids), states, window)


def spell(scene: Scene, pieces: Pieces, dropped: bool) -> tuple[list[int], list[int]]:
    """CLIP's ids and T5's."""
    if dropped:
        return make_clip_ids([NOTHING]), pad([IDS[NOTHING]])
    ground = [GROUND_CHARACTERS[scene.background]] if scene.named else []
    return make_clip_ids(ground), pad(pieces.spell(scene))


def make_optimizers(painter: Painter, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks; AdamW for the rest."""
    blocks = {
        name: value
        for name, value in painter.transformer.named_parameters()
        if value.ndim == 2 and "transformer_blocks" in name
    }
    rest = [value for name, value in painter.named_parameters() if name.removeprefix("transformer.") not in blocks]
    return [
        Muon(blocks.values(), lr, weight_decay=0.01),
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
    lr: float | None = None,
    warmup: int = 200,
    limit: int | None = None,
    earlier: Path | None = None,
) -> list[float]:
    """Train for `minutes` in all (earlier runs counted in), or `limit` steps. Returns the losses of this run.

    It begins with the weights of `earlier`, an edition's folder, unless that is None, and learns then in smaller steps
    (`lr` None). The guidance scale is drawn and means nothing: the model draws alike at any.
    """
    lr = lr or (RATE if earlier is None else LATER_RATE)
    painter, generator = Painter(seed, alphabet.norm), SeededGenerator(seed)
    if earlier is not None:
        painter.load_edition(earlier)
    painter.to(device)
    if limit is None:
        torch._dynamo.config.recompile_limit = 64  # each shape is a graph of its own
        for block in (*painter.transformer.transformer_blocks, *painter.transformer.single_transformer_blocks):
            block.compile(dynamic=False)

    def make(step: int) -> Future[Batch]:
        return beside.submit(batch, stamps, pieces, t5, generator.at(step))

    def loss_at(_progress: float, step: int) -> torch.Tensor:
        latents, clip_ids, states, window = (waiting.pop() if waiting else make(step)).result()
        waiting.append(make(step + 1))
        mixed, noise, t = add_noise(latents)
        with mixed_precision(device), fast_attention(device):
            velocity = painter(*(x.to(device) for x in (mixed, t, draw_guidance(len(t)), clip_ids, states)), window)
        return torch.nn.functional.mse_loss(velocity.float(), (noise - latents).to(device))

    stage = Stage("flow", out / "flow.ckpt", painter, make_optimizers(painter, lr), lr, warmup, EMA, minutes, limit)
    with ThreadPoolExecutor(1) as beside:  # the next batch is made while this one is learned from
        waiting = list[Future[Batch]]()
        return run(stage, loss_at, "loss {:.4f}".format)


def add_noise(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(1 - t) latents + t noise`, the noise, and t."""
    noise, t = torch.randn_like(latents), draw_times(len(latents))
    return (1 - t)[:, None, None] * latents + t[:, None, None] * noise, noise, t
