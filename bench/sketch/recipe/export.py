"""Writes a diffusers folder in float16 from the checkpoints, and `manifest.json`: what a server must know of it."""

import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from bench.sketch.recipe import phrases
from bench.sketch.recipe.atlas import PACKAGE, Atlas
from bench.sketch.recipe.codec import CHANNELS, Codec
from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS, SCENES
from bench.sketch.recipe.data import TOKEN, make_scene, render
from bench.sketch.recipe.encoder import set_encoder
from bench.sketch.recipe.flow import GUIDANCE, SHIFT, Painter
from bench.sketch.recipe.grammar import make_clip_tokenizer, make_t5_tokenizer
from bench.sketch.recipe.layouts import CANVAS
from bench.sketch.recipe.pieces import Pieces
from bench.sketch.recipe.training import load_averaged_weights
from bench.sketch.recipe.vae import make_vae
from bench.sketch.recipe.words import TOKENS

SOURCES = f"{PACKAGE} (Fluent Emoji, Microsoft Corporation, MIT): pictures; names and captions by this project"
PREVIEW_SCENES = 64
IDEAS = (
    "a red heart and a blue star",
    "a robot and a teddy bear in a room",
    "a T-Rex with sunglasses on the beach",
    "three purple stars on a yellow background",
    "a sailboat on the sea",
    "a white house in the forest",
)


def export(
    out: Path,
    target: Path,
    atlas: Atlas,
    codec: Codec,
    pieces: Pieces,
    t5: T5EncoderModel,
    seed: int,
    earlier: Path | None = None,
) -> None:
    """Write the model to `target`. The autoencoder is `earlier`'s, an edition's folder, unless that is None."""
    painter = Painter(seed)
    painter.load_state_dict(load_averaged_weights(out / "flow.ckpt"))
    if earlier is not None:
        autoencoder = AutoencoderKL.from_pretrained(earlier / "vae", local_files_only=True)
    else:
        autoencoder = make_autoencoder(out, atlas, codec, seed)
    shutil.rmtree(target, ignore_errors=True)
    assemble(painter, t5, autoencoder, pieces).to(torch.float16).save_pretrained(target)
    if earlier is not None:  # as it is: diffusers would write down the folder that it was read from
        shutil.copytree(earlier / "vae", target / "vae", dirs_exist_ok=True)
    for file in target.rglob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt", "sources": SOURCES, "licence": "Apache-2.0"})
    (target / "manifest.json").write_text(
        json.dumps(make_manifest(out / "flow.ckpt", atlas, codec, seed), indent=1) + "\n"
    )


def make_autoencoder(out: Path, atlas: Atlas, codec: Codec, seed: int) -> AutoencoderKL:
    vae = make_vae(seed)
    vae.decoder.load_state_dict(load_averaged_weights(out / "decoder.ckpt"))
    set_encoder(vae, atlas, codec, seed)
    return vae


def assemble(painter: Painter, t5: T5EncoderModel, vae: AutoencoderKL, pieces: Pieces) -> FluxPipeline:
    """The pipeline around the trained parts. Its schedule shifts every size alike, as in training."""
    mu = math.log(SHIFT)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=mu, max_shift=mu),
        vae=vae,
        text_encoder=painter.clip,
        tokenizer=make_clip_tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=make_t5_tokenizer(pieces),
        transformer=painter.transformer,
    )


def make_manifest(stage: Path, atlas: Atlas, codec: Codec, seed: int) -> dict[str, Any]:
    """What a server must know of the model, and what people want to."""
    saved = torch.load(stage, weights_only=True, map_location="cpu")
    factors, bias = preview_map(atlas, codec, seed)
    return {
        "text_tokens": TOKENS,
        "guidance": GUIDANCE,
        "canvas": (CANVAS * TOKEN, CANVAS * TOKEN),
        "preview": {"factors": factors, "bias": bias},
        "ideas": IDEAS,
        "knows": {
            "things": {concept.name: list(concept.other) for concept in CONCEPTS},
            "colours": {"of": [concept.name for concept in CONCEPTS if concept.colourable], "are": list(COLOURS)},
            "backgrounds": list(BACKGROUNDS),
            "scenes": list(SCENES),
            "words": " ".join(phrases.list_words()),
        },
        "training": {"stage": stage.stem, "steps": saved["step"], "seed": seed, "torch": version("torch")},
        "sources": SOURCES,
    }


def preview_map(atlas: Atlas, codec: Codec, seed: int) -> tuple[list[list[float]], list[float]]:
    """Least squares from a latent's channels to the mean colour of its patch, -1 to 1."""
    rng = np.random.default_rng(seed)
    latents, colours = [], []
    for _ in range(PREVIEW_SCENES):
        picture = render(make_scene(rng), atlas) * 2 - 1
        codes = codec.encode((picture + 1) / 2).reshape(CHANNELS, -1).T.numpy()
        side = picture.shape[0] * 2 // TOKEN
        latents.append(np.concatenate([codes, np.ones((len(codes), 1))], axis=1))
        colours.append(picture.reshape(side, TOKEN // 2, side, TOKEN // 2, 3).mean(axis=(1, 3)).reshape(-1, 3))
    solution, *_ = np.linalg.lstsq(np.concatenate(latents), np.concatenate(colours), rcond=None)
    rounded = [[round(float(x), 4) for x in row] for row in solution]
    return rounded[:-1], rounded[-1]
