"""The state of one image: everything that a step reads and changes. Samples share no state."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pipelines.acceleration import Mask
from pipelines.engine.canvas import CanvasFit
from pipelines.engine.forward import Residuals
from pipelines.engine.modulation import TransformerVariant
from pipelines.fields import Size
from pipelines.request import ImageRequest


@dataclass(frozen=True, slots=True)
class Text:
    """An encoded prompt: T5 states `(1, tokens, width)`, CLIP's pooled state `(1, width)`, ids `(tokens, 3)`."""

    states: torch.Tensor
    pooled: torch.Tensor
    ids: torch.Tensor
    notes: tuple[str, ...]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sample:
    """The state of one image. `latents` are packed, `(1, tokens, channels * 4)`; `step` counts the finished steps."""

    canvas_fit: CanvasFit
    text: Text
    latents: torch.Tensor
    image_ids: torch.Tensor
    guidance: torch.Tensor | None
    scheduler: FlowMatchEulerDiscreteScheduler
    timesteps: torch.Tensor
    times: tuple[float, ...]  # the timesteps again, for arithmetic that must not wait for the device
    computed: Mask
    variant: TransformerVariant
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # where the engine caches them
    modulation: torch.Tensor | None = (
        None  # vectors of all steps, `(steps, sum of widths)`, where they are made at once
    )
    residuals: Residuals = field(default_factory=Residuals)
    step: int = 0
    velocity: torch.Tensor | None = None  # of the last step

    @property
    def kind(self) -> Hashable:
        """Samples whose next steps are of the same kind can be rows of one forward pass."""
        return self.size, self.variant.precision, all(self.computed), self.computed[self.step]

    @property
    def size(self) -> Size:
        """The size that the model draws."""
        return self.canvas_fit.drawn

    @property
    def request(self) -> ImageRequest:
        """The request as the model draws it; `canvas_fit.size` is the requested size."""
        return self.canvas_fit.request

    @property
    def time(self) -> float:
        return self.times[self.step]

    def advance(self, velocity: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Take a step along `velocity`, and store the residual of a computed one."""
        timestep = self.timesteps[self.step]
        self.latents = self.scheduler.step(velocity, timestep, self.latents, return_dict=False)[0]
        if residual is not None:
            self.residuals.add(self.time, residual)
        self.velocity = velocity
        self.step += 1

    def tensors(self) -> list[torch.Tensor]:
        """Everything that the steps so far have changed."""
        return [self.latents, *([] if self.velocity is None else [self.velocity]), *self.residuals.tensors()]

    @property
    def clean(self) -> torch.Tensor | None:
        """The latents that the last velocity would lead to; None before the first step."""
        if self.velocity is None:
            return None
        left: torch.Tensor = self.scheduler.sigmas[self.scheduler.step_index]
        return self.latents - left * self.velocity


def rows(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One tensor with the given rows; a single row is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
