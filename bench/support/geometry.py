"""FLUX.1 [dev]'s real shapes with random weights, created on the device: nothing is downloaded.

Seconds depend on the shapes and not on the weights, because our presets skip steps by a fixed mask, never by the data.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipelines.engine.modulation import share_weights_copy
from weights import tiny

TRANSFORMER = {"guidance_embeds": True}  # the class's defaults are FLUX.1 [dev]'s, but for this
VAE = tiny.VAE | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
CLIP = {"projection_dim": 768, "eos_token_id": 2}  # CLIP-L: the class's defaults for width 768
CLIP |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
TEXT_TOKENS = 512
CLIP_TOKENS = 77


class Layers(NamedTuple):
    """How many layers each part has; the defaults are FLUX.1 [dev]'s."""

    double: int = 19
    single: int = 38
    t5: int = 24
    clip: int = 12


class Model(NamedTuple):
    """A pipeline to measure, and how many tokens its prompts have."""

    pipeline: FluxPipeline
    text_tokens: int


def flux(dtype: torch.dtype, device: torch.device, layers: Layers = Layers()) -> Model:  # noqa: B008
    """FLUX.1 [dev]: 11.9 billion parameters in the transformer, 4.8 in T5. Needs 34 GB in bfloat16."""
    t5, clip = T5 | {"num_layers": layers.t5}, CLIP | {"num_hidden_layers": layers.clip}
    blocks = {"num_layers": layers.double, "num_single_layers": layers.single}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # created in `dtype`: float32 first would need twice the memory
    try:
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(tiny.SEED)
            parts: dict[str, Any] = {
                "transformer": FluxTransformer2DModel(**TRANSFORMER, **blocks),
                "vae": AutoencoderKL(**(VAE | {"mid_block_add_attention": True})),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
                "text_encoder_2": T5EncoderModel(T5Config(**t5)),
            }
    finally:
        torch.set_default_dtype(before)
    for part in parts.values():
        part.eval().requires_grad_(False).to(dtype)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**tiny.SCHEDULER),
        tokenizer=tiny.byte_tokenizer("<|startoftext|>", "<|endoftext|>", "<pad>", CLIP_TOKENS),
        tokenizer_2=tiny.byte_tokenizer(None, "</s>", "<pad>", TEXT_TOKENS),
        **parts,
    )
    return Model(pipeline, TEXT_TOKENS)


def small(dtype: torch.dtype, device: torch.device) -> Model:
    """The embedded `tiny`, to try the bench itself."""
    return Model(tiny.build(dtype).to(device), tiny.TEXT_TOKENS)


def own_copy(pipeline: FluxPipeline) -> FluxPipeline:
    """A pipeline to optimize without changing the other. It shares all weights but the VAE's."""
    parts = {"transformer": share_weights_copy(pipeline.transformer), "vae": copy.deepcopy(pipeline.vae)}
    parts["transformer"].set_attention_backend("native")  # diffusers keeps one backend for the process
    return FluxPipeline(**{name: part for name, part in (pipeline.components | parts).items() if part is not None})


MODELS: Mapping[str, Callable[[torch.dtype, torch.device], Model]] = {"flux": flux, "tiny": small}


def step_flops(config: Any, text_tokens: int, width: int, height: int) -> float:
    """Floating-point operations of one computed step: 24 d^2 S of linear layers and 4 S^2 d of attention a block."""
    tokens = text_tokens + width * height / 16**2
    d = config.attention_head_dim * config.num_attention_heads
    blocks = config.num_layers + config.num_single_layers
    return float(blocks * (24 * d**2 * tokens + 4 * tokens**2 * d))
