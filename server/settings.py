"""Every setting: its name, default and meaning. The only reader of the environment.

Each field is an environment variable (`SRPO_PORT`) and a flag (`--port`); `srpo serve --help` and the table in
docs/configuration.md are generated from here.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pipelines.optimize.optimizations import OPTIMIZATIONS, validate_names
from pipelines.request import IMAGE_SIZE
from pipelines.safety.checkers import spelled
from weights.checkpoints import CHECKPOINTS
from weights.lora_file import parse_lora

Names = Annotated[tuple[str, ...], NoDecode]
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def split(value: Any) -> Any:
    """A list from text with commas; anything else as it is."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class EnvironmentSettings(BaseSettings):
    """Settings from `SRPO_*` environment variables, and from flags where a command has them."""

    model_config = SettingsConfigDict(
        env_prefix="SRPO_",
        frozen=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_prefix_target="all",  # SRPO_ also before a former name that is still accepted
    )


class EngineSettings(EnvironmentSettings):
    """What is served, and on what: the settings that `srpo serve` and `srpo generate` share."""

    models_dir: Path = Field(Path("models"), description="folder with the model files")
    model: str = Field(
        "auto",
        description=f"auto (SRPO where its files are, else the embedded model), or one of {', '.join(CHECKPOINTS)}",
    )
    transformer: Path | None = Field(
        None,
        description="a transformer in any format (see docs/weights.md), in the place of the model's own: safetensors, "
        "GGUF or a diffusers folder",
    )
    lora: Names = Field(
        (), description="LoRA files to merge, FILE or FILE:SCALE; the flag can be repeated, or separate them by commas"
    )
    devices: Names = Field(
        ("auto",),
        description="auto (CUDA when there is one), cpu, cuda, cuda:1, ...; several, separated by commas, get a worker "
        "each; joined like cuda:0+cuda:1 they draw each image together",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="precision; auto is bfloat16 on CUDA and float32 on a CPU"
    )
    placement: Literal["auto", "resident", "offload-text", "float8", "float8-offload", "offload"] = Field(
        "auto",
        description="what stays on the card, and how it is stored: resident, offload-text, float8, float8-offload, "
        "offload; auto takes the first of them but the last that the card's total memory holds",
    )
    batch_sizes: Names = Field(
        ("512x512",),
        description="sizes at which requests share a step, if the device is seen to change no bit by that; small sizes "
        "gain, large ones do not",
    )
    tile_above: float | None = Field(
        None,
        gt=0,
        description="megapixels (2^20) above which images are decoded in tiles: less memory, not exact; none: never",
    )
    optimizations: Names = Field(
        ("default",),
        validation_alias=AliasChoices("optimizations", "levers"),  # its name up to 0.1
        description=f"what makes the engine fast: default (by device), none, or some of {', '.join(OPTIMIZATIONS)}",
    )
    compile_cache: Path | None = Field(
        None,
        description="folder that keeps compiled kernels over restarts; none: compiled/ in the server's data folder",
    )
    step_timeout: float = Field(120.0, gt=0, description="seconds of silence after which a busy worker is replaced")
    jpeg_quality: int = Field(95, ge=1, le=100, description="quality of JPEG and WebP files")
    omit_parameters: bool = Field(
        False, description="leave prompt, seed and the like out of image files; that a model made them is always there"
    )
    c2pa_certificate: Path | None = Field(
        None, description="PEM file of your certificate chain, leaf first: image files are then signed (C2PA)"
    )
    c2pa_key: Path | None = Field(None, description="PEM file of the certificate's private key")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = Field(
        "es256", description="the key's signature algorithm"
    )

    safety_checker: str = Field(
        "embedded",
        description="embedded (open_nsfw: photographic nudity only), folder:PATH, compvis:PATH, hook:URL, several "
        "separated by commas, or none",
    )
    safety_labels: Names = Field(
        (), description="the labels of folder:PATH that are unsafe, separated by commas; none: those of usual names"
    )
    safety_device: str = Field("cpu", description="device of folder:PATH and compvis:PATH: cpu, cuda, cuda:1, ...")
    safety_threshold: float = Field(0.5, gt=0, le=1, description="score from which an image is flagged")
    safety_policy: Literal["client", "always", "never"] = Field(
        "client", description="client (enable_safety_checker decides), always or never"
    )
    safety_action: Literal["black", "blur", "error", "flag"] = Field(
        "black",
        description="a flagged image becomes: black, blur, error (if all are flagged, else black), flag (unchanged)",
    )
    prompt_hook: str | None = Field(None, description="URL of your moderation service for prompts")
    prompt_list: Path | None = Field(
        None, description="file of words and /regular expressions/ that no prompt may contain, one a line"
    )

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        if value != "auto" and value not in CHECKPOINTS:
            raise ValueError(f"expected auto or one of {', '.join(CHECKPOINTS)}")
        return value

    @model_validator(mode="after")
    def _whole_pair(self) -> Self:
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise ValueError("C2PA needs both SRPO_C2PA_CERTIFICATE and SRPO_C2PA_KEY")
        return self

    @field_validator("safety_checker")
    @classmethod
    def _known_checker(cls, value: str) -> str:
        spelled(value)
        return value

    @field_validator("batch_sizes")
    @classmethod
    def _sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            try:
                width, height = map(int, text.split("x"))
                IMAGE_SIZE.parse({"width": width, "height": height})
            except ValueError:
                raise ValueError(f"{text!r}: expected sizes like 512x768, {IMAGE_SIZE.side.expected}") from None
        return value

    @field_validator("devices")
    @classmethod
    def _devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = re.compile(r"auto|cuda|cuda:\d+(\+cuda:\d+)*|cpu(\+cpu)*")
        if not value or not all(known.fullmatch(device) for device in value):
            raise ValueError("expected auto, cpu, cuda, or devices like cuda:0,cuda:1 or cuda:0+cuda:1")
        return value

    @field_validator("optimizations")
    @classmethod
    def _known_optimizations(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return validate_names(value)

    @field_validator("lora")
    @classmethod
    def _valid_loras(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_lora(text)
        return value

    @field_validator("devices", "lora", "safety_labels", "batch_sizes", "optimizations", mode="before")
    @classmethod
    def _split_labels(cls, value: Any) -> Any:
        return split(value)


class Settings(EngineSettings):
    """The server's settings."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    public_url: str | None = Field(
        None,
        description="the server's address as clients see it, behind a proxy or in a container; begins image URLs",
    )
    data_dir: Path = Field(Path("data"), description="folder for images and other state; one server at a time")
    api_keys: Names = Field(
        (), description="keys that clients may use, separated by commas; none: open to all on loopback"
    )
    api_keys_file: Path | None = Field(None, description="file of key hashes, a line each, as `srpo keys` prints them")
    allow_no_keys: bool = Field(False, description="serve beyond this machine without keys")
    queue_size: int = Field(64, ge=0, description="requests that may wait; one more gets a 429")
    max_running: int = Field(16, ge=1, description="requests that progress together, step by step, the shortest first")
    request_timeout: float = Field(
        600.0, gt=0, description="seconds a request may take, waiting included; then it is a 504"
    )
    body_timeout: float = Field(30.0, gt=0, description="seconds a client may take to send its request")
    shutdown_grace: int = Field(60, ge=0, description="seconds that requests in flight get to finish at shutdown")
    max_body: int = Field(2**24, ge=1024, description="largest request body, in bytes or with a unit (16MiB)")
    max_upload: int = Field(
        50 * 2**20, ge=1024, description="largest picture in a form to /v1/images/edits (50MiB), beside a body's text"
    )
    no_fetch: bool = Field(
        False, description="fetch no source pictures from the internet: image-to-image then takes only data URIs"
    )
    previews: Literal["blurred", "sharp", "none"] = Field(
        "blurred",
        description="what a stream shows of an image that is not checked yet: blurred (a thumbnail), sharp or none",
    )
    safety_timeout: float = Field(10.0, gt=0, description="seconds a safety check may take; then it is a 503")
    images_expire: float = Field(86400.0, gt=0, description="seconds an image stays at its URL")
    images_cap: int = Field(
        10 * 2**30, gt=0, description="disk space for images (10GiB); beyond it the oldest go first"
    )
    success_status: int = Field(201, description="HTTP status of a success, 200 or 201: the hosted API documents both")
    credits_per_megapixel: int = Field(52500, ge=0, description="credits an image costs for each started megapixel")
    cors_origins: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="origins whose pages may call the API, separated by commas, or *; default: * with keys, else none",
    )
    forwarded_allow_ips: str | None = Field(
        None, description="proxies whose X-Forwarded headers count, separated by commas"
    )
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else json")
    log_prompts: bool = Field(False, description="write prompts to the log")

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split(value)

    @field_validator("max_body", "max_upload", "images_cap", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if isinstance(value, str) and value[-3:] in UNITS:
            return int(float(value[:-3]) * UNITS[value[-3:]])
        return value

    @field_validator("success_status")
    @classmethod
    def _one_of_two(cls, value: int) -> int:
        if value not in (200, 201):
            raise ValueError("expected 200 or 201")
        return value

    @field_validator("public_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL that begins with http:// or https://")
        return value.rstrip("/") if value else None

    @field_validator("api_keys")
    @classmethod
    def _printable_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in value):
            raise ValueError("a key needs at least 8 printable ASCII characters and no spaces")
        return value

    @model_validator(mode="after")
    def _not_open_to_the_network(self) -> "Settings":
        if not self.is_loopback and not self.needs_key and not self.allow_no_keys:
            raise ValueError(
                f"{self.host} is reachable from other machines and no API keys are set. Set SRPO_API_KEYS (or "
                "SRPO_API_KEYS_FILE; `srpo keys` makes one), listen on 127.0.0.1, or say --allow-no-keys"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def needs_key(self) -> bool:
        return bool(self.api_keys) or self.api_keys_file is not None
