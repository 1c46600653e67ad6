"""One image on its way: everything that a step reads and changes. Nothing of it is shared with another sample."""

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
    """One image on its way. `latents` are packed, `(1, tokens, channels * 4)`; `step` counts the finished steps."""

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
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # where the engine keeps them
    modulation: torch.Tensor | None = None  # of all steps, `(steps, ...)`, where they are made in one pass
    residuals: Residuals = field(default_factory=Residuals)
    step: int = 0
    velocity: torch.Tensor | None = None  # of the last step

    @property
    def kind(self) -> Hashable:
        """Samples whose next steps are of one kind can be rows of one forward pass."""
        return self.size, self.variant.precision, all(self.computed), self.computed[self.step]

    @property
    def size(self) -> Size:
        """As it is drawn."""
        return self.canvas_fit.drawn

    @property
    def request(self) -> ImageRequest:
        """As the model draws it; `canvas_fit.size` is what was asked for."""
        return self.canvas_fit.request

    @property
    def time(self) -> float:
        return self.times[self.step]

    def advance(self, velocity: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Take the step that `velocity` points to, and remember the residual of a computed one."""
        now = self.timesteps[self.step]
        self.latents = self.scheduler.step(velocity, now, self.latents, return_dict=False)[0]
        if residual is not None:
            self.residuals.keep(self.time, residual)
        self.velocity = velocity
        self.step += 1

    def tensors(self) -> list[torch.Tensor]:
        """What the steps so far have made of it."""
        return [self.latents, *([] if self.velocity is None else [self.velocity]), *self.residuals.tensors()]

    @property
    def clean(self) -> torch.Tensor | None:
        """The latents as they would be if the last velocity held to the end; None before the first step."""
        if self.velocity is None:
            return None
        left: torch.Tensor = self.scheduler.sigmas[self.scheduler.step_index]
        return self.latents - left * self.velocity


def rows(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of one row each as the rows of one; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
