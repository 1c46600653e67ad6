"""Products of the same inputs as one: the weights of several layers, read once.

In each attention query, key and value are one product instead of three; in a single block the first layer of its MLP is
part of it too. diffusers' attentions know such layers (`fused_projections`), but its own way keeps the three beside the
joined one. Here they are moved into it, so it takes no memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers import transformer_flux

from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.optimize.context import Change, OptimizationContext
from weights.formats.fp8_linear import Float8Linear

# A block's layers, by the name of the joined one: of a double block's tokens of the image and of the text, of a single
# block's tokens.
DOUBLE = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE = {"proj_in": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
LAYERS = (torch.nn.Linear, Float8Linear)  # of these, all tensors' rows are outputs


class ProjectionsUnavailable(RuntimeError):
    """The layers cannot be joined as they are stored."""


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):  # type: ignore[misc]
    """diffusers' block (0.42) with `proj_in` for query, key, value and MLP.

    It has the name of diffusers' class, by which `compile_repeated_blocks` finds it.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the image and of the text, `(batch, tokens, width)` each; returns the text's and the image's."""
        text = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(residual, emb=temb)
        joined = self.proj_in(normed)
        projections, mlp = joined.split([joined.shape[-1] - self.mlp_hidden_dim, self.mlp_hidden_dim], dim=-1)
        attended = self.attn(
            hidden_states=projections, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        mixed = self.proj_out(torch.cat([attended, self.act_mlp(mlp)], dim=2))
        states = residual + gate.unsqueeze(1) * mixed
        if states.dtype == torch.float16:
            states = states.clip(-65504, 65504)
        return states[:, :text], states[:, text:]


def fuse_projections(engine: FluxEngine, _: OptimizationContext) -> Change:
    """Join the layers of every block. Raises `ProjectionsUnavailable`, with all layers as before."""
    blocks = list(iterate_blocks(engine))
    layers = [block.get_submodule(name) for block, joined in blocks for names in joined.values() for name in names]
    if any(type(layer) not in LAYERS or hasattr(layer, "_diffusers_hook") for layer in layers):
        raise ProjectionsUnavailable("the placement streams the transformer's layers one by one")
    for block, joined in blocks:
        made = {name: join_layers([block.get_submodule(one) for one in names]) for name, names in joined.items()}
        for name, names in joined.items():  # nothing is left to fail: a block changes as a whole
            replace_layers(block, names, {name: made[name]})
        block.attn.fused_projections = True
        if joined is SINGLE:
            block.attn.to_qkv = torch.nn.Identity()  # it is given the product
            block.__class__ = FluxSingleTransformerBlock
    return Change(engine.options)


def separate_projections(engine: FluxEngine) -> EngineOptions:
    """Layers of their own again, which share the joined one's memory."""
    for block, joined in iterate_blocks(engine):
        if not block.attn.fused_projections:
            continue
        for name, separate in joined.items():
            layer, widths = block.get_submodule(name), [block.attn.inner_dim] * 3
            if joined is SINGLE:
                widths.append(block.mlp_hidden_dim)
            replace_layers(block, [name], dict(zip(separate, split_layer(layer, widths), strict=True)))
        block.attn.fused_projections = False
        if joined is SINGLE:
            del block.attn.to_qkv
            block.__class__ = transformer_flux.FluxSingleTransformerBlock
    return engine.options


def iterate_blocks(engine: FluxEngine) -> Iterator[tuple[Any, Mapping[str, Sequence[str]]]]:
    """Each block, and what is joined in it."""
    for variant in engine.distinct_variants():
        for block in variant.transformer.transformer_blocks:
            yield block, DOUBLE
        for block in variant.transformer.single_transformer_blocks:
            yield block, SINGLE


def replace_layers(block: torch.nn.Module, old: Sequence[str], new: Mapping[str, torch.nn.Module]) -> None:
    """Names are paths below the block."""
    for path in old:
        parent, _, name = path.rpartition(".")
        delattr(block.get_submodule(parent), name)
    for path, layer in new.items():
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, layer)


def join_layers(layers: Sequence[torch.nn.Linear]) -> torch.nn.Linear:
    """One layer whose outputs are those of all layers, in their order."""
    parts = [layer.state_dict() for layer in layers]
    return make_layer(layers[0], {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def split_layer(layer: torch.nn.Linear, widths: Sequence[int]) -> list[torch.nn.Linear]:
    """Layers that have so many of the outputs each, and their part of the layer's memory."""
    parts = {name: tensor.split(list(widths)) for name, tensor in layer.state_dict().items()}
    return [make_layer(layer, {name: part[index] for name, part in parts.items()}) for index in range(len(widths))]


def make_layer(like: torch.nn.Linear, tensors: dict[str, torch.Tensor]) -> torch.nn.Linear:
    """A layer of the same class that has these tensors."""
    with torch.device("meta"):
        layer = type(like)(like.in_features, len(tensors["weight"]), like.bias is not None)
    layer.requires_grad_(False).load_state_dict(tensors, assign=True)
    return layer.train(like.training)
