"""Query, key and value of an attention by one product instead of three: the same weights, read once.

diffusers' blocks know such attentions (`fused_projections`), but its own way keeps the three layers beside the joined
one. Here they are moved into it, so it takes no memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.optimize.context import Change, OptimizationContext
from weights.formats.fp8_linear import Float8Linear

# By the name that the blocks use for the joined layer: those of the image's tokens, and of the text's in double blocks.
JOINED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
LAYERS = (torch.nn.Linear, Float8Linear)  # of these, all tensors' rows are outputs


class ProjectionsUnavailable(RuntimeError):
    """The layers cannot be joined as they are stored."""


def fuse_projections(engine: FluxEngine, _: OptimizationContext) -> Change:
    """Join the three layers of every attention. Raises `ProjectionsUnavailable`, with all layers as before."""
    attentions = list(iterate_attentions(engine))
    layers = [getattr(attention, name) for attention in attentions for name in list_separate(attention)]
    if any(type(layer) not in LAYERS or hasattr(layer, "_diffusers_hook") for layer in layers):
        raise ProjectionsUnavailable("the placement streams the transformer's layers one by one")
    for attention in attentions:
        for joined, separate in JOINED.items():
            if hasattr(attention, separate[0]):
                setattr(attention, joined, join_layers([getattr(attention, name) for name in separate]))
                for name in separate:
                    delattr(attention, name)
        attention.fused_projections = True
    return Change(engine.options)


def separate_projections(engine: FluxEngine) -> EngineOptions:
    """Three layers again, which share the joined one's memory."""
    for attention in iterate_attentions(engine):
        for joined, separate in JOINED.items():
            if hasattr(attention, joined):
                for name, layer in zip(separate, split_layer(getattr(attention, joined), len(separate)), strict=True):
                    setattr(attention, name, layer)
                delattr(attention, joined)
        attention.fused_projections = False
    return engine.options


def iterate_attentions(engine: FluxEngine) -> Iterator[Any]:
    for variant in engine.distinct_variants():
        for block in (*variant.transformer.transformer_blocks, *variant.transformer.single_transformer_blocks):
            yield block.attn


def list_separate(attention: torch.nn.Module) -> list[str]:
    return [name for separate in JOINED.values() for name in separate if hasattr(attention, name)]


def join_layers(layers: Sequence[torch.nn.Linear]) -> torch.nn.Linear:
    """One layer whose outputs are those of all layers, in their order."""
    parts = [layer.state_dict() for layer in layers]
    return make_layer(layers[0], {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def split_layer(layer: torch.nn.Linear, count: int) -> list[torch.nn.Linear]:
    """`count` layers, each with its share of the outputs and of the layer's memory."""
    parts = {name: tensor.chunk(count) for name, tensor in layer.state_dict().items()}
    return [make_layer(layer, {name: chunks[index] for name, chunks in parts.items()}) for index in range(count)]


def make_layer(like: torch.nn.Linear, tensors: dict[str, torch.Tensor]) -> torch.nn.Linear:
    """A layer of the same class that has these tensors."""
    with torch.device("meta"):
        layer = type(like)(like.in_features, len(tensors["weight"]), like.bias is not None)
    layer.requires_grad_(False).load_state_dict(tensors, assign=True)
    return layer.train(like.training)
