"""What is served, on what device and how: settings of the server and of `srpo generate` alike."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipelines.fields import Choice
from pipelines.loading.placement import PLACEMENTS
from pipelines.optimize.optimizations import OPTIMIZATIONS, validate_names
from pipelines.request import IMAGE_SIZE
from pipelines.safety.checkers import parse_checkers
from pipelines.safety.guard import ACTIONS, POLICIES
from server.settings.faults import WorkerSettings
from server.settings.types import Names, describe_choices
from weights.checkpoints import CHECKPOINTS
from weights.lora_file import parse_lora


class EngineSettings(WorkerSettings):
    """What is served, and on what: the settings that `srpo serve` and `srpo generate` share."""

    data_dir: Path = Field(
        Path("data"),
        description="folder for images and other state, with what was measured about the device; only one server at a "
        "time can use it",
    )
    models_dir: Path = Field(Path("models"), description="folder with the model files")
    model: str = Field(
        "auto",
        description="auto (flux/srpo if any of its files is in models_dir, else the embedded model), or one of "
        + ", ".join(CHECKPOINTS),
    )
    transformer: Path | None = Field(
        None,
        description="a transformer to use instead of the model's own: a safetensors or GGUF file, or a diffusers "
        "folder (see docs/weights.md)",
    )
    verify_weights: bool = Field(
        False, description="read every byte of pulled weights at each start; else their sizes and samples are compared"
    )
    lora: Names = Field(
        (), description="LoRA files to merge into the transformer: FILE or FILE:SCALE, separated by commas"
    )
    devices: Names = Field(
        ("auto",),
        description="auto (CUDA if there is a card, else the CPU for the embedded models), cpu, cuda, cuda:1, ...; "
        "each of several devices, separated by commas, gets its own worker; devices joined like cuda:0+cuda:1 draw "
        "each image together",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision of the weights; auto: bfloat16 on CUDA, float32 on a CPU"
    )
    placement: Annotated[str, Choice(("auto", *PLACEMENTS))] = Field(
        "auto",
        description="which parts of the model stay on the card, and in which precision: one of "
        f"{', '.join(PLACEMENTS)}; auto: the first that fits the card's total memory, never "
        + ", ".join(name for name, spec in PLACEMENTS.items() if not spec.automatic),
    )
    batch_sizes: Names = Field(
        ("512x512",),
        description="image sizes at which several requests share one forward pass, if a measurement shows that this "
        "changes no bit of the images on this device; small sizes become faster, large ones do not",
    )
    tile_above: float | None = Field(
        None,
        gt=0,
        description="image size, in megapixels of 2^20, above which images are decoded in tiles: this needs less "
        "memory, and changes the pixels slightly; none: never",
    )
    optimizations: Annotated[Names, AfterValidator(validate_names)] = Field(
        ("default",),
        description="how the engine is made faster: default (those that suit the device), none, or some of "
        + ", ".join(OPTIMIZATIONS),
    )
    compile_cache: Path | None = Field(
        None,
        description="folder for compiled kernels, so that a restart need not compile again; none: compiled/ in "
        "data_dir",
    )
    jpeg_quality: int = Field(95, ge=1, le=100, description="quality of JPEG and WebP files, 1 to 100")
    omit_parameters: bool = Field(
        False,
        description="write no prompt, seed or other parameter into image files; the mark that a model made them stays",
    )
    c2pa_certificate: Path | None = Field(
        None, description="PEM file with your certificate chain, leaf first; with it, image files are signed (C2PA)"
    )
    c2pa_key: Path | None = Field(None, description="PEM file with the private key of the certificate")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = Field(
        "es256", description="signature algorithm of the private key"
    )

    safety_checker: str = Field(
        "embedded",
        description="what checks images: embedded (open_nsfw: photographic nudity only), folder:PATH, compvis:PATH, "
        "hook:URL, several of them separated by commas, or none",
    )
    safety_labels: Names = Field(
        (),
        description="the labels of the classifier in folder:PATH that mean unsafe, separated by commas; none: labels "
        "with common names such as nsfw",
    )
    safety_device: str = Field(
        "cpu", description="device that runs folder:PATH and compvis:PATH: cpu, cuda, cuda:1, ..."
    )
    safety_threshold: float = Field(
        0.5, gt=0, le=1, description="score, from 0 to 1, at and above which an image is flagged"
    )
    safety_policy: Annotated[str, Choice(tuple(POLICIES))] = Field(
        "client",
        description=f"which images are checked: {describe_choices(POLICIES)}",
    )
    safety_action: Annotated[str, Choice(tuple(ACTIONS))] = Field(
        "black",
        description="what happens to a flagged image: "
        + describe_choices({name: action.description for name, action in ACTIONS.items()}),
    )
    safety_timeout: float = Field(
        10.0,
        gt=0,
        description="seconds that the check of a prompt or of an image may take, without its wait for others; then the "
        "answer is 503",
    )
    prompt_hook: str | None = Field(None, description="URL of a moderation service that judges each prompt")
    prompt_list: Path | None = Field(
        None, description="file with words and /regular expressions/, one a line, that no prompt may contain"
    )

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        if value != "auto" and value not in CHECKPOINTS:
            raise ValueError(f"expected auto or one of {', '.join(CHECKPOINTS)}")
        return value

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise ValueError("C2PA needs both SRPO_C2PA_CERTIFICATE and SRPO_C2PA_KEY")
        return self

    @field_validator("safety_checker")
    @classmethod
    def _check_checker(cls, value: str) -> str:
        parse_checkers(value)
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _check_sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                width, height = map(int, text.split("x"))
                IMAGE_SIZE.parse({"width": width, "height": height})
            except ValueError:
                raise ValueError(f"{text!r}: expected sizes like 512x768, {IMAGE_SIZE.side.expected}") from None
        return value

    @property
    def processes(self) -> int:
        """How many processes load the model: devices that are joined have one each."""
        return sum(len(device.split("+")) for device in self.devices)

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = re.compile(r"auto|cuda|cuda:\d+(\+cuda:\d+)*|cpu(\+cpu)*")
        if not value or not all(known.fullmatch(device) for device in value):
            raise ValueError("expected auto, cpu, cuda, or devices like cuda:0,cuda:1 or cuda:0+cuda:1")
        return value

    @field_validator("lora")
    @classmethod
    def _check_loras(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_lora(text)
        return value
