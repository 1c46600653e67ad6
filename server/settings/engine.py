"""What is served, on what device and how: settings of the server and of `srpo generate` alike."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from pipelines.fields import Choice
from pipelines.loading.placement import PLACEMENTS
from pipelines.optimize.optimizations import OPTIMIZATIONS, validate_names
from pipelines.request import IMAGE_SIZE
from server.settings.faults import WorkerSettings
from server.settings.files import FileSettings
from server.settings.safety import SafetySettings
from server.settings.types import COMMON, Folder, Names
from weights.checkpoints import CHECKPOINTS
from weights.lora_file import parse_lora


class EngineSettings(WorkerSettings, SafetySettings, FileSettings):
    """Model and devices."""

    data_dir: Folder = Field(
        Path("data"),
        description="folder for images and other state, with what was measured about the device; only one server at a "
        "time can use it",
        json_schema_extra=COMMON,
    )
    models_dir: Folder = Field(Path("models"), description="folder with the model files", json_schema_extra=COMMON)
    model: str = Field(
        "auto",
        description="auto (flux/srpo if any of its files is in models_dir, else the embedded model), or one of "
        + ", ".join(CHECKPOINTS),
        json_schema_extra=COMMON,
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
        json_schema_extra=COMMON,
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
    compile_cache: Folder | None = Field(
        None,
        description="folder for compiled kernels, so that a restart need not compile again; none: compiled/ in "
        "data_dir",
    )

    @field_validator("model")
    @classmethod
    def _check_model(cls, value: str) -> str:
        if value != "auto" and value not in CHECKPOINTS:
            raise ValueError(f"expected auto or one of {', '.join(CHECKPOINTS)}")
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
