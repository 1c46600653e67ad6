"""Who reaches the server, and where. Part of the settings."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from server.settings.types import COMMON, EnvironmentSettings, Keys, Metavar, Names, Port, is_loopback


class AccessSettings(EnvironmentSettings):
    """Address, keys and pages."""

    host: str = Field("127.0.0.1", description="address to listen on", json_schema_extra=COMMON)
    port: Port = Field(
        8000, ge=0, le=65535, description="port to listen on; 0 takes a free one", json_schema_extra=COMMON
    )
    public_url: str | None = Field(
        None,
        description="the server's address as clients see it, if it runs behind a proxy or in a container; image URLs "
        "begin with it",
        json_schema_extra=COMMON,
    )
    forwarded_allow_ips: Annotated[str, Metavar("ADDRESS[,...]")] | None = Field(
        None,
        description="addresses of proxies whose X-Forwarded headers are trusted, separated by commas",
        json_schema_extra=COMMON,
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
        json_schema_extra=COMMON,
    )
    allow_no_keys: bool = Field(False, description="let other machines use the API without a key")
    cors_origins: Names | None = Field(
        None,
        description="origins of the web pages that may call the API, separated by commas, or *; default: * where keys "
        "are needed, else none",
    )
    pages: Names = Field(
        ("playground", "docs"),
        description="pages that the server shows: playground, docs (the API reference), both, or none: then there is "
        "no /openapi.json either, which both are made from",
    )

    @field_validator("pages")
    @classmethod
    def _check_pages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - {"playground", "docs", "none"}:
            raise ValueError(f"{unknown.pop()!r}: expected playground, docs, both or none")
        return tuple(page for page in value if page != "none")

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
    def _check_access(self) -> Self:
        if not self.is_loopback and not self.needs_key and not self.allow_no_keys:
            raise ValueError(
                f"{self.host} is reachable from other machines and no API keys are set. Set SRPO_API_KEYS (or "
                "SRPO_API_KEYS_FILE; `srpo keys` makes one), say --require-key and make one with `srpo keys add`, "
                "listen on 127.0.0.1, or say --allow-no-keys"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def needs_key(self) -> bool:
        return self.require_key or bool(self.api_keys) or self.api_keys_file is not None
