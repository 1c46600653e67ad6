"""All settings of `srpo serve`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from server.settings.engine import EngineSettings
from server.settings.faults import DamageSettings
from server.settings.limits import LimitSettings
from server.settings.metrics import MetricsSettings
from server.settings.storage import ReplicaSettings, StoreSettings
from server.settings.types import Bytes, Keys, Names, Seconds, is_loopback
from server.settings.webhooks import WebhookSettings
from weights.checkpoints import CHECKPOINTS, HOSTED_MODEL


class Settings(
    ReplicaSettings, StoreSettings, LimitSettings, DamageSettings, MetricsSettings, WebhookSettings, EngineSettings
):
    """The server's settings."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    public_url: str | None = Field(
        None,
        description="the server's address as clients see it, if it runs behind a proxy or in a container; image URLs "
        "begin with it",
    )
    api_keys: Keys = Field(
        (),
        description="keys that clients may use, separated by commas; none: every client on this machine may use the "
        "API",
    )
    api_keys_file: Path | None = Field(
        None, description="file with key hashes, one a line, as `srpo keys line` prints them"
    )
    require_key: bool = Field(
        False,
        description="refuse every request without a key, also while there is none: for keys that `srpo keys add` makes",
    )
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
    images_expire: Seconds = Field(
        86400.0, gt=0, description="seconds (or 90s, 15m, 2h, 7d) after which a stored image is deleted"
    )
    link_lifetime: Seconds | None = Field(
        None,
        gt=0,
        description="seconds (or 90s, 15m, 2h) for which an image's URL is valid: it is signed, and each reply has a "
        "new one; none: as long as the image is there",
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
        "not name a format, dall-e-* answers with url and gpt-image-* with b64_json, both with PNG",
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
        description="origins of the web pages that may call the API, separated by commas, or *; default: * where keys "
        "are needed, else none",
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
                "SRPO_API_KEYS_FILE; `srpo keys` makes one), say --require-key and make one with `srpo keys add`, "
                "listen on 127.0.0.1, or say --allow-no-keys"
            )
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> "Settings":
        if self.metrics_port is not None and self.metrics_port == self.port:
            raise ValueError("metrics_port must differ from port; leave it out to serve metrics on the server's port")
        return self

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def needs_key(self) -> bool:
        return self.require_key or bool(self.api_keys) or self.api_keys_file is not None
