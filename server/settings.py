"""Every setting: its name, default and meaning. The only reader of the environment.

Each field is an environment variable (`SRPO_PORT`) and a flag (`--port`); `srpo serve --help` and the table in
docs/configuration.md are generated from here.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AliasChoices, Field, field_validator, model_validator

from pipelines.optimize.optimizations import OPTIMIZATIONS, validate_names
from pipelines.request import IMAGE_SIZE
from pipelines.safety.checkers import parse_checkers
from server.fault_settings import DamageSettings, WorkerSettings
from server.limit_settings import LimitSettings
from server.setting_types import Bytes, Keys, Names
from weights.checkpoints import CHECKPOINTS, HOSTED_MODEL
from weights.lora_file import parse_lora


class EngineSettings(WorkerSettings):
    """What is served, and on what: the settings that `srpo serve` and `srpo generate` share."""

    models_dir: Path = Field(Path("models"), description="folder with the model files")
    model: str = Field(
        "auto",
        description="auto (flux/srpo if its files are in models_dir, else the embedded model), or one of "
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
    placement: Literal["auto", "resident", "offload-text", "float8", "float8-offload", "offload"] = Field(
        "auto",
        description="which parts of the model stay on the card, and in which precision: resident, offload-text, "
        "float8, float8-offload or offload; auto: the first that fits the card's total memory, never offload",
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
        validation_alias=AliasChoices("optimizations", "levers"),  # its name up to 0.1
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
    safety_policy: Literal["client", "always", "never"] = Field(
        "client",
        description="which images are checked: client (enable_safety_checker in the request decides), always or never",
    )
    safety_action: Literal["black", "blur", "error", "flag"] = Field(
        "black",
        description="what happens to a flagged image: black, blur, error (an error if every image is flagged, else "
        "black) or flag (the image is unchanged and marked in the reply)",
    )
    safety_timeout: float = Field(
        10.0,
        gt=0,
        description="seconds that the check of a prompt or of an image may take; then the answer is 503",
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


class Settings(LimitSettings, DamageSettings, EngineSettings):
    """The server's settings."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    public_url: str | None = Field(
        None,
        description="the server's address as clients see it, if it runs behind a proxy or in a container; image URLs "
        "begin with it",
    )
    data_dir: Path = Field(
        Path("data"), description="folder for images and other state; only one server at a time can use it"
    )
    api_keys: Keys = Field(
        (),
        description="keys that clients may use, separated by commas; none: every client on this machine may use the "
        "API",
    )
    api_keys_file: Path | None = Field(None, description="file with key hashes, one a line, as `srpo keys` prints them")
    allow_no_keys: bool = Field(False, description="let other machines use the API without a key")
    pages: Names = Field(
        ("playground", "docs"),
        description="pages that the server shows: playground, docs (the API reference), both, or none: then there is "
        "no /openapi.json either, which both are made from",
    )
    no_fetch: bool = Field(
        False, description="never fetch source pictures from the internet; image-to-image then accepts data URIs only"
    )
    previews: Literal["blurred", "sharp", "none"] = Field(
        "blurred",
        description="how a stream shows an unfinished image that is not checked yet: blurred (a small thumbnail), "
        "sharp or none",
    )
    constant_images: Literal["note", "error"] = Field(
        "note",
        description="what happens to an image all of one colour: note (timings.notes and /health say so) or error (the "
        "request fails)",
    )
    images_expire: float = Field(86400.0, gt=0, description="seconds after which a stored image is deleted")
    link_lifetime: float | None = Field(
        None,
        gt=0,
        description="seconds for which an image's URL is valid: it is signed, and each reply has a new one; none: as "
        "long as the image is there",
    )
    link_secrets: Names = Field(
        (),
        description="secrets that sign image URLs, separated by commas: the first signs, all are accepted; none: one "
        "that is kept in data_dir",
    )
    images_cap: Bytes = Field(
        10 * 2**30, gt=0, description="disk space for images (10GiB); above it the oldest images are deleted"
    )
    response_format: Literal["url", "b64_json", "both"] = Field(
        "url", description="how images come back if the request does not say it: url, b64_json or both"
    )
    model_aliases: Names = Field(
        (),
        description="more names for models, NAME=MODEL separated by commas (dall-e-3=flux/srpo); if the request does "
        "not name a format, dall-e-* answers with url and gpt-image-* with b64_json",
    )
    edit_pictures: Literal["first", "one"] = Field(
        "first",
        description="several pictures in one edit: first (the first is used, the others are named in "
        "x-ignored-fields) or one (they are refused with 400)",
    )
    success_status: int = Field(201, description="HTTP status of a success: 200 or 201 (the hosted API documents both)")
    credits_per_megapixel: int = Field(52500, ge=0, description="credits for each started megapixel of an image")
    cors_origins: Names | None = Field(
        None,
        description="origins of the web pages that may call the API, separated by commas, or *; default: * if keys "
        "are required, else none",
    )
    forwarded_allow_ips: str | None = Field(
        None, description="addresses of proxies whose X-Forwarded headers are trusted, separated by commas"
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="format of the log: console, json, or auto (console on a terminal, else json)"
    )
    log_prompts: bool = Field(False, description="write prompts to the log")

    @field_validator("pages")
    @classmethod
    def _check_pages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - {"playground", "docs", "none"}:
            raise ValueError(f"{unknown.pop()!r}: expected playground, docs, both or none")
        return tuple(page for page in value if page != "none")

    @field_validator("success_status")
    @classmethod
    def _check_success_status(cls, value: int) -> int:
        if value not in (200, 201):
            raise ValueError("expected 200 or 201")
        return value

    @field_validator("model_aliases")
    @classmethod
    def _check_model_aliases(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = (HOSTED_MODEL, *CHECKPOINTS)
        for text in value:
            name, _, model = text.partition("=")
            if not name or name in known or model not in known:
                raise ValueError(f"{text!r}: expected NAME=MODEL, with a new name and one of {', '.join(known)}")
        return value

    @field_validator("public_url")
    @classmethod
    def _check_public_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL that begins with http:// or https://")
        return value.rstrip("/") if value else None

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in value):
            raise ValueError("a key needs at least 8 printable ASCII characters and no spaces")
        return value

    @model_validator(mode="after")
    def _check_access(self) -> "Settings":
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
