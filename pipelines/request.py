"""What an image is asked for with, and what comes back. No torch, no HTTP.

`GenerationParams` is the one list of generation parameters: names, kinds, bounds, defaults and help; beside it
`ImageToImageParams`, which has a source picture where the other has a size. Bounds are those of the hosted flux/srpo
and flux/srpo/image-to-image APIs. Nothing else in the project declares a parameter.
"""

import secrets
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from pipelines.acceleration import PRESETS
from pipelines.fields import Boolean, Choice, ImageSize, Integer, Number, ParamType, Size, Text, Url
from pipelines.image_formats import IMAGE_FORMATS, TITLES
from weights.checkpoints import CHECKPOINTS

MAX_SEED = 2**63 - 1
MAX_DRAWN_SEED = 2**31 - 1  # exact in every client's JSON, and distinct modulo 2^32
SKIPPED_STEP = 0.02  # of a computed step: one of FLUX.1's 57 blocks, and the head
OUTPUT_FORMATS = tuple(sorted(IMAGE_FORMATS))
SIZES: Mapping[str, Size] = {
    "square_hd": Size(1024, 1024),
    "square": Size(512, 512),
    "portrait_4_3": Size(768, 1024),
    "portrait_16_9": Size(576, 1024),
    "landscape_4_3": Size(1024, 768),
    "landscape_16_9": Size(1024, 576),
}
STEPS, STEPS_HELP = Integer(1, 50), "Denoising steps. More steps, more detail, more time."
IMAGE_SIZE = ImageSize(SIZES, Integer(512, 1536, multiple_of=32), SIZES["landscape_4_3"])


def draw_seed() -> int:
    """A seed for a request that names none: 1 to 2^31 - 1."""
    return secrets.randbelow(MAX_DRAWN_SEED) + 1


class PromptParams(BaseModel):
    """What comes first everywhere."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: Annotated[str, Text(1, 4000)] = Field(
        description="What the image shows: its content, style and composition."
    )


class CommonParams(PromptParams):
    """The parameters of every model."""

    num_inference_steps: Annotated[int, STEPS] = Field(default=28, description=STEPS_HELP)
    guidance_scale: Annotated[float, Number(1, 20)] = Field(
        default=4.5, description="How closely the image keeps to the prompt."
    )
    num_images: Annotated[int, Integer(1, 4)] = Field(
        default=1, description="How many images; image i is made with seed + i."
    )
    seed: Annotated[int, Integer(1, MAX_SEED)] = Field(
        default_factory=draw_seed,
        description="Same seed, same request, same image. Absent: the server draws one and reports it.",
    )
    sync_mode: Annotated[bool, Boolean()] = Field(
        default=False, description="true: the image comes inside the reply, as a data URI in `url`."
    )
    enable_safety_checker: Annotated[bool, Boolean()] = Field(
        default=True, description="Check every image; a flagged one comes back black."
    )
    output_format: Annotated[str, Choice(OUTPUT_FORMATS)] = Field(
        default="jpeg", description="The image file's format. webp is an extension of this server."
    )
    acceleration: Annotated[str, Choice(tuple(PRESETS))] = Field(
        default="regular", description="none computes every step exactly; regular and high trade exactness for speed."
    )

    def _request(self, model: str, size: Size, source: "Source | None") -> "ImageRequest":
        """The request the pipeline understands: sizes are numbers, every image has its seed."""
        return ImageRequest(
            model=model,
            prompt=self.prompt,
            width=size.width,
            height=size.height,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seeds=tuple(range(self.seed, self.seed + self.num_images)),
            acceleration=self.acceleration,
            source=source,
        )


class TextToImageParams(PromptParams):
    """An image of a size that is asked for."""

    image_size: Annotated[Size, IMAGE_SIZE] = Field(
        default=SIZES["landscape_4_3"],
        description="A preset, or an object with width and height in pixels.",
        json_schema_extra={"default": "landscape_4_3"},
    )


class SourceImageParams(PromptParams):
    """An image that begins at a picture, and takes its size."""

    image_url: Annotated[str, Url()] = Field(
        description=f"The picture to begin with ({TITLES}): its address, or a data URI. The image takes its size."
    )
    strength: Annotated[float, Number(0, 1)] = Field(
        default=0.95, description="How much of the picture may change, from 0 (hardly anything) to 1 (all of it)."
    )


class GenerationParams(CommonParams, TextToImageParams):
    """The generation parameters: each is a field on the wire, a flag of `srpo generate` and a row in docs/api.md."""

    def to_request(self, model: str) -> "ImageRequest":
        return self._request(model, self.image_size, None)


class ImageToImageParams(CommonParams, SourceImageParams):
    """The parameters of image-to-image."""

    num_inference_steps: Annotated[int, STEPS] = Field(default=40, description=STEPS_HELP)

    def to_request(self, model: str, size: Size, pixels: bytes) -> "ImageRequest":
        """`pixels` are the picture's, 8-bit RGB of this size."""
        return self._request(model, size, Source(pixels, self.strength))


def param_type_of(info: FieldInfo) -> ParamType:
    """The kind that a parameter is declared with."""
    return next(part for part in info.metadata if isinstance(part, ParamType))


PARAM_TYPES: Mapping[str, ParamType] = {
    name: param_type_of(info)
    for name, info in (GenerationParams.model_fields | ImageToImageParams.model_fields).items()
}
P = TypeVar("P", bound=CommonParams)


def for_model(model: str, base: type[P]) -> type[P]:
    """`base` with the bounds, defaults and remarks of a row of `CHECKPOINTS`; `base` itself where it has none."""
    row = CHECKPOINTS.get(model)
    own = {**row.bounds, **row.defaults, **row.remarks} if row else {}
    if row is None or not own:
        return base
    fields: dict[str, Any] = {}
    for name in own:
        info = copy(base.model_fields[name])
        default = row.defaults.get(name, info.default)
        kind = param_type_of(info)
        if name in row.bounds and isinstance(kind, Integer | Number):
            low, high = row.bounds[name]
            kind = replace(kind, low=low, high=high)
        meaning = " ".join(filter(None, (info.description, row.remarks.get(name))))
        fields[name] = (Annotated[info.annotation, kind], Field(default=default, description=meaning))
    return create_model(base.__name__, __base__=base, __module__=base.__module__, **fields)


@cache
def weigh_steps(acceleration: str, steps: int) -> float:
    """In computed steps. Asked for every unfinished request at every step of one, so it is remembered."""
    return sum(1.0 if compute else SKIPPED_STEP for compute in PRESETS[acceleration](steps))


@dataclass(frozen=True, slots=True)
class Source:
    """The picture that image-to-image begins with: 8-bit RGB, row-major, of the request's own size.

    `strength` from 0 to 1 is the share of the steps that are carried out, and so how much of the picture may change.
    """

    pixels: bytes
    strength: float


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One validated request: sizes are pixels, the seeds are chosen. Pure: running it again gives the same pixels."""

    model: str
    prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    acceleration: str
    source: Source | None = None

    @property
    def steps(self) -> int:
        """How many are carried out: all, or the last ones over a source; at least one."""
        if self.source is None:
            return self.num_inference_steps
        kept = min(self.num_inference_steps * self.source.strength, self.num_inference_steps)
        return max(1, self.num_inference_steps - int(self.num_inference_steps - kept))

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.width * self.height

    @property
    def cost(self) -> float:
        """Work in computed megapixel-steps; `CostModel` turns it into seconds by what was measured."""
        return self.pixels * weigh_steps(self.acceleration, self.steps) * len(self.seeds) / 2**20

    def to_json(self) -> dict[str, Any]:
        """All but the source's pixels, which travel beside it as they are.

        Defaults are left out: an earlier version can read what asks for nothing that it does not know.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["source"] = self.source and {"strength": self.source.strength}
        return {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}

    @classmethod
    def from_json(cls, data: dict[str, Any], pixels: bytes = b"") -> "ImageRequest":
        source = Source(pixels, **data["source"]) if data.get("source") else None
        return cls(**{**data, "seeds": tuple(data["seeds"]), "source": source})


def make_probe(
    size: Size,
    steps: int,
    preset: str,
    *,
    prompt: str = "a red apple",
    guidance_scale: float = 4.5,
    seed: int = 1,
) -> ImageRequest:
    """A request of the engine's own, to measure or to compare what it draws: one image, of whatever model is loaded."""
    return ImageRequest(
        model="",
        prompt=prompt,
        width=size.width,
        height=size.height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seeds=(seed,),
        acceleration=preset,
    )


class Stage(NamedTuple):
    """When a stage (text, denoise or decode) began and ended, in seconds from a request's start on the device."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. `inference` is wall time from a request's start on the device to its last pixel."""

    queue: float = 0.0
    inference: float = 0.0
    text: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0

    @property
    def device(self) -> float:
        """The device's own work for this request; its share, where it had its steps together with others."""
        return self.text + self.denoise + self.decode


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The finished images: 8-bit RGB, row-major, `width * height * 3` bytes each, in the order of `request.seeds`."""

    request: ImageRequest
    pixels: tuple[bytes, ...]
    timings: Timings
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()  # in their order
