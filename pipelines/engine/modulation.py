"""One copy of the transformer on the device, and the modulation of all steps in one pass.

FLUX's blocks are modulated by vectors that depend on the time, the guidance and the prompt's pooled state alone, made
by 27 % of the parameters in matrix-vector products: reading those weights anew in every step takes 1.5 ms on an H200.
Taken for all steps at once they are read once an image. A product of 28 rows may round differently from 28 products.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Part(torch.nn.Module):
    """The `index`-th half of the vector that came in the place of the time's embedding."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.chunk(2, dim=1)[self.index]


class Modulation:
    """Takes the modulation's layers out of a transformer; from then on its blocks expect their vectors, made here."""

    def __init__(self, transformer: Any) -> None:
        self._embed = transformer.time_text_embed
        self._layers: list[list[Any]] = []
        self._taken: list[tuple[Any, Any, Any]] = []  # norm, activation, layer
        for block in transformer.transformer_blocks:
            self._take(block.norm1, block.norm1_context)
        for block in transformer.single_transformer_blocks:
            self._take(block.norm)
        self._take(transformer.norm_out)
        self.widths = [sum(layer.out_features for layer in layers) for layers in self._layers]

    def _take(self, *norms: Any) -> None:
        self._layers.append([norm.linear for norm in norms])
        for index, norm in enumerate(norms):
            self._taken.append((norm, norm.silu, norm.linear))
            norm.silu = torch.nn.Identity()
            norm.linear = Part(index) if len(norms) > 1 else torch.nn.Identity()

    def give_back(self) -> None:
        """Put the layers back in their places."""
        for norm, activation, layer in self._taken:
            norm.silu, norm.linear = activation, layer

    def table(self, times: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor) -> torch.Tensor:
        """All vectors of all steps, `(steps, sum of widths)`; `times` as the model takes them, `(steps,)`."""
        strength = () if guidance is None else ((guidance.to(times.dtype) * 1000).expand(len(times)),)
        embedded = self._embed(times * 1000, *strength, pooled.expand(len(times), -1))
        active = torch.nn.functional.silu(embedded)
        return torch.cat([layer(active) for layers in self._layers for layer in layers], dim=1)

    def split(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """What each block and the output layer take, from rows of tables."""
        return torch.split(rows, self.widths, dim=1)


@dataclass(slots=True)
class TransformerVariant:
    """A transformer as the engine runs it. `precision` is that of its blocks' linear layers."""

    transformer: Any
    precision: str
    modulation: Modulation | None = None


def share_weights_copy(module: Any) -> Any:
    """A copy that can be changed by itself and shares every tensor with the original: no memory for weights."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
