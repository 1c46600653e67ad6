"""The names and shapes of FLUX.1's transformer tensors, in diffusers' keys and in the original ones. No torch.

With these tables a header is checked without building a model. The tests compare them with diffusers' class on the
meta device, and with its converter.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from weights.checkpoints import ArchitectureName

Shape = tuple[int, ...]
# The attention and MLP matrices of the blocks: the tensors that the fp8 and 4-bit formats quantize.
BLOCK_LINEARS = re.compile(r"(single_)?transformer_blocks\.\d+\.(attn\.(to|add)_|ff|proj_)[\w.]*\.weight")


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """The part of diffusers' configuration that decides the shapes. The defaults are FLUX.1 [dev]'s."""

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    out_channels: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a transformer's `config.json`. Unknown entries are ignored."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class Architecture(NamedTuple):
    """A transformer that can be served. `name`: as rows of `CHECKPOINTS` name it; None where none of them has it."""

    name: ArchitectureName | None
    title: str
    config: TransformerConfig


ARCHITECTURES = (
    Architecture("flux-dev", "FLUX.1 [dev]", TransformerConfig()),
    Architecture("flux-schnell", "FLUX.1 [schnell]", TransformerConfig(guidance_embeds=False)),
    Architecture(
        "tiny",
        "tiny",
        TransformerConfig(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
        ),
    ),
)

TIMESTEP_CHANNELS = 256  # the width of a timestep's sinusoidal embedding
TOP_KEYS = {  # original: diffusers
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
DOUBLE_KEYS = {  # original: diffusers; several are concatenated along the rows
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE_KEYS = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
SWAPPED_HALVES = "final_layer.adaLN_modulation.1"  # its halves (shift, scale) are in the other order in diffusers


def tensor_shapes(config: TransformerConfig) -> dict[str, Shape]:
    """The shape of every tensor of the transformer, by its diffusers key."""
    found: dict[str, Shape] = {}
    for name, shape in _linears(config):
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]
    for kind, count, norms in (
        ("transformer_blocks", config.num_layers, DOUBLE_NORMS),
        ("single_transformer_blocks", config.num_single_layers, SINGLE_NORMS),
    ):
        for index in range(count):
            found |= {f"{kind}.{index}.{norm}.weight": (config.attention_head_dim,) for norm in norms.values()}
    return found


def stack_shape(shapes: Mapping[str, Shape], parts: Sequence[str]) -> Shape:
    """The shape of a tensor that holds the rows of all `parts`."""
    return sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:]


def _linears(config: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    """The name of every linear layer, and the shape (rows, columns) of its weight."""
    d = config.inner_dim
    columns = {
        "x_embedder": config.in_channels,
        "context_embedder": config.joint_attention_dim,
        "time_text_embed.timestep_embedder.linear_1": TIMESTEP_CHANNELS,
        "time_text_embed.guidance_embedder.linear_1": TIMESTEP_CHANNELS,
        "time_text_embed.text_embedder.linear_1": config.pooled_projection_dim,
    }
    rows = {"norm_out.linear": 2 * d, "proj_out": config.out_channels or config.in_channels}
    for name in TOP_KEYS.values():
        if config.guidance_embeds or "guidance" not in name:
            yield name, (rows.get(name, d), columns.get(name, d))
    for index in range(config.num_layers):
        for stack in DOUBLE_KEYS.values():
            for name in stack:
                tall = 6 if name.startswith("norm") else 4 if name.endswith("net.0.proj") else 1
                yield f"transformer_blocks.{index}.{name}", (tall * d, 4 * d if name.endswith("net.2") else d)
    for index in range(config.num_single_layers):
        for name, tall, wide in (("norm.linear", 3, 1), ("proj_mlp", 4, 1), ("proj_out", 1, 5)):
            yield f"single_transformer_blocks.{index}.{name}", (tall * d, wide * d)
        for name in SINGLE_KEYS["linear1"][:3]:
            yield f"single_transformer_blocks.{index}.{name}", (d, d)


def original_to_diffusers(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """For every original key, the diffusers tensors whose rows it holds, from top to bottom."""
    found: dict[str, tuple[str, ...]] = {}
    for name, ours in TOP_KEYS.items():
        if config.guidance_embeds or "guidance" not in name:
            for suffix in ("weight", "bias"):
                found[f"{name}.{suffix}"] = (f"{ours}.{suffix}",)
    for theirs, ours, count, linears, norms in (
        ("double_blocks", "transformer_blocks", config.num_layers, DOUBLE_KEYS, DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", config.num_single_layers, SINGLE_KEYS, SINGLE_NORMS),
    ):
        for index in range(count):
            for name, stack in linears.items():
                for suffix in ("weight", "bias"):
                    found[f"{theirs}.{index}.{name}.{suffix}"] = tuple(f"{ours}.{index}.{n}.{suffix}" for n in stack)
            for name, norm in norms.items():
                found[f"{theirs}.{index}.{name}.scale"] = (f"{ours}.{index}.{norm}.weight",)
    return found
