"""A transformer step that may skip all blocks but the first.

The forward pass of `FluxTransformer2DModel`, called submodule by submodule. A computed step equals the model's own
`forward` bit for bit, and its residual is stored: what the blocks after the first one add to the image. In a skipped
step the residual is extrapolated from the last two computed steps to first order in the schedule's time (TaylorSeer,
arXiv 2503.06923, on the residual of a first-block cache). Residuals belong to one sample: neighbours and aborted runs
cannot reach them, and a step that fails does not change them.
"""

from collections.abc import Sequence
from typing import Any

import torch


class Residuals:
    """The last two residuals of one sample, `(1, tokens, width)` each, with the times they were computed at."""

    def __init__(self) -> None:
        self._computed: list[tuple[float, torch.Tensor]] = []

    def add(self, time: float, residual: torch.Tensor) -> None:
        self._computed = [*self._computed[-1:], (time, residual)]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(residual for _, residual in self._computed)

    def at(self, time: float) -> torch.Tensor:
        """The residual expected at `time`. At least one step has been computed."""
        newest_time, newest = self._computed[-1]
        if len(self._computed) == 1:
            return newest
        before_time, before = self._computed[0]
        return torch.lerp(before, newest, (time - before_time) / (newest_time - before_time))


def forward(
    model: Any,
    extrapolated: torch.Tensor | None,
    *,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    modulation: Sequence[torch.Tensor] | None = None,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    guidance: torch.Tensor | None,
    pooled_projections: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    txt_ids: torch.Tensor,
    img_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocity `(rows, tokens, channels)` and residual `(rows, tokens, width)`; inputs as for the model's `forward`.

    `extrapolated` is the residual of a skipped step; None computes it. `rotary` and `modulation` (one entry for each
    block and one for the output) are cached values; None computes them.
    """
    image = model.x_embedder(hidden_states)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    if modulation is None:
        scaled = [1000 * value.to(image.dtype) for value in (timestep, guidance) if value is not None]
        modulation = [model.time_text_embed(*scaled, pooled_projections)] * (len(blocks) + 1)
    if rotary is None:
        rotary = model.pos_embed(torch.cat((txt_ids, img_ids), dim=0))
    text = model.context_embedder(encoder_hidden_states)
    shared: dict[str, Any] = {"image_rotary_emb": rotary, "joint_attention_kwargs": {}}
    text, image = blocks[0](hidden_states=image, encoder_hidden_states=text, temb=modulation[0], **shared)
    residual = extrapolated
    if residual is None:
        start = image
        for block, vector in zip(blocks[1:], modulation[1:-1], strict=True):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=vector, **shared)
        residual = image - start
    else:
        image = image + residual
    velocity: torch.Tensor = model.proj_out(model.norm_out(image, modulation[-1]))
    return velocity, residual
