"""A transformer as the engine runs it, and the modulation vectors of all steps in one product.

FLUX's blocks are modulated by vectors that depend only on the time, the guidance and the prompt's pooled state. They
are products with 27 % of all parameters: reading these weights in every step is estimated to take 1.5 ms on an H200.
For all steps at once they are read once an image. A product of 28 rows may round differently from 28 products.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


class HalfOfVector(torch.nn.Module):
    """In the place of a linear layer: the `index`-th half of the vector given in place of the time's embedding."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.chunk(2, dim=1)[self.index]


class Modulation:
    """Takes the modulation's layers out of a transformer, whose blocks then expect the vectors that `table` makes."""

    def __init__(self, transformer: Any) -> None:
        self._embed = transformer.time_text_embed
        self._layers: list[list[Any]] = []
        self._replaced: list[tuple[Any, Any, Any]] = []  # norm, activation, layer
        for block in transformer.transformer_blocks:
            self._extract(block.norm1, block.norm1_context)
        for block in transformer.single_transformer_blocks:
            self._extract(block.norm)
        self._extract(transformer.norm_out)
        self.widths = [sum(layer.out_features for layer in layers) for layers in self._layers]

    def _extract(self, *norms: Any) -> None:
        self._layers.append([norm.linear for norm in norms])
        for index, norm in enumerate(norms):
            self._replaced.append((norm, norm.silu, norm.linear))
            norm.silu = torch.nn.Identity()
            norm.linear = HalfOfVector(index) if len(norms) > 1 else torch.nn.Identity()

    def restore(self) -> None:
        """Put the layers back into the transformer."""
        for norm, activation, layer in self._replaced:
            norm.silu, norm.linear = activation, layer

    def table(self, times: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor) -> torch.Tensor:
        """All vectors of all steps, `(steps, sum of widths)`; `times` are from 0 to 1, `(steps,)`."""
        scaled_guidance = () if guidance is None else ((guidance.to(times.dtype) * 1000).expand(len(times)),)
        embedded = self._embed(times * 1000, *scaled_guidance, pooled.expand(len(times), -1))
        active = torch.nn.functional.silu(embedded)
        return torch.cat([layer(active) for layers in self._layers for layer in layers], dim=1)

    def split(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """The vectors of each block and of the output layer, from rows of tables."""
        return torch.split(rows, self.widths, dim=1)


@dataclass(frozen=True, slots=True)
class TransformerVariant:
    """A transformer, the `precision` of its blocks' linear layers, and its modulation where that was taken out."""

    transformer: Any
    precision: str
    modulation: Modulation | None = None


def share_weights_copy(module: Any) -> Any:
    """A copy that can be changed independently but shares every tensor with the original: it takes no memory."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
