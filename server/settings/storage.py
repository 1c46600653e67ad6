"""Where a server keeps its records, and how several servers share them. Part of the settings."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from server.settings.types import EnvironmentSettings

POSTGRES = "postgresql+psycopg://"
SPELLINGS = (POSTGRES, "postgresql://", "postgres://")


class DatabaseSettings(EnvironmentSettings):
    """Which database."""

    database_url: SecretStr | None = Field(
        None,
        description="the Postgres database that several servers share, postgresql://USER:PASSWORD@HOST/NAME (see "
        "docs/replicas.md); none: jobs.sqlite3 in data_dir",
    )

    @field_validator("database_url", mode="before")
    @classmethod
    def _check_database_url(cls, value: Any) -> Any:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if text is None:
            return None
        for spelling in SPELLINGS:
            if isinstance(text, str) and text.startswith(spelling):
                return SecretStr(POSTGRES + text.removeprefix(spelling))
        raise ValueError("expected postgresql://USER:PASSWORD@HOST/NAME")  # without the value: it holds a password


class ReplicaSettings(DatabaseSettings):
    """How servers that share a database share its jobs."""

    lease: float = Field(
        30.0,
        ge=1,
        description="seconds after which another server of the same database takes over the jobs of one that is gone",
    )


class BucketSettings(EnvironmentSettings):
    """Where buckets are."""

    store_endpoint: str | None = Field(
        None, description="address of the S3 service, if it is not AWS: https://HOST, or http:// for one without TLS"
    )

    @field_validator("store_endpoint")
    @classmethod
    def _check_store_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith(("http://", "https://")) or "@" in value):
            raise ValueError("expected an address that begins with https:// or http://, without a password")
        return value


class StoreSettings(BucketSettings):
    """Where finished images are kept."""

    store_url: str | None = Field(
        None,
        description="where images are kept: file:///FOLDER, or s3://BUCKET/PREFIX, which several servers share (see "
        "docs/replicas.md); none: in data_dir",
    )
    store_links: Literal["proxied", "signed"] = Field(
        "proxied",
        description="how clients get images from an s3:// store: proxied (this server reads them) or signed (it sends "
        "clients on to a URL of the bucket that is valid for five minutes)",
    )

    @field_validator("store_url")
    @classmethod
    def _check_store_url(cls, value: str | None) -> str | None:
        parts = urlsplit(value or "file:///data")
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("expected no password, ? or #: credentials are taken from AWS_ variables")
        if (parts.scheme == "file" and not parts.netloc and parts.path.startswith("/")) or (
            parts.scheme == "s3" and parts.netloc
        ):
            return value
        raise ValueError("expected file:///FOLDER or s3://BUCKET/PREFIX")
