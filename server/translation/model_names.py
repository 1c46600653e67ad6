"""What models are called: the names that requests may give, and what follows from a name alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipelines.request import CommonParams, GenerationParams, ImageToImageParams
from weights.checkpoints import HOSTED_MODEL

IMAGE_TO_IMAGE = "/image-to-image"  # after the name of a model


class Namesake(NamedTuple):
    """What OpenAI's models of a name answer where the request leaves it open."""

    response_format: str
    detailed: bool  # with `usage`, `size`, `output_format` and `background`
    output_format: str = "png"  # several clients take it for granted


NAMESAKES: Mapping[str, Namesake] = {
    "dall-e-": Namesake("url", detailed=False),
    "gpt-image-": Namesake("b64_json", detailed=True),
}


@dataclass(frozen=True)
class Dialect:
    """What the operator decides about requests that leave it open, or that name other models."""

    served: str = HOSTED_MODEL  # id of the loaded model
    response_format: str = "url"
    model_aliases: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, model: str) -> str:
        """The model that a name stands for; with `/image-to-image` behind it too."""
        name, kind = split_kind(model)
        target = self.model_aliases.get(name)
        return model if target is None else target + kind

    def namesake(self, model: object) -> Namesake | None:
        """The models of OpenAI's that an alias is named like."""
        if isinstance(model, str) and split_kind(model)[0] in self.model_aliases:
            return next((namesake for name, namesake in NAMESAKES.items() if model.startswith(name)), None)
        return None


def split_kind(model: str) -> tuple[str, str]:
    """A model's name, and `/image-to-image` if that is behind it."""
    name = model.removesuffix(IMAGE_TO_IMAGE)
    return name, model[len(name) :]


HOSTED_DIALECT = Dialect()


def params_of(model: object) -> type[CommonParams]:
    """The parameters of the model that a request names; what is no name has those of text-to-image."""
    sourced = isinstance(model, str) and model.endswith(IMAGE_TO_IMAGE)
    return ImageToImageParams if sourced else GenerationParams
