"""Where a server keeps its records, and how several servers share them. Part of the settings."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, field_validator

from server.settings.types import EnvironmentSettings, Seconds, Url

POSTGRES = "postgresql+psycopg://"
SPELLINGS = (POSTGRES, "postgresql://", "postgres://")


class StoreType(NamedTuple):
    """A kind of store: what opens it ("module:callable"), what its URLs look like, and whether one is complete."""

    factory: str
    form: str
    is_complete: Callable[[SplitResult], bool]


def names_folder(url: SplitResult) -> bool:
    return not url.netloc and url.path.startswith("/")


def names_bucket(url: SplitResult) -> bool:
    return bool(url.netloc)


STORES: Mapping[str, StoreType] = {  # by the URL's scheme
    "file": StoreType("server.images.stores.table:open_local", "file:///FOLDER", names_folder),
    "s3": StoreType("server.images.stores.table:open_s3", "s3://BUCKET/PREFIX", names_bucket),
}
STORE_FORMS = " or ".join(row.form for row in STORES.values())


class DatabaseSettings(EnvironmentSettings):
    """The database."""

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
    """Several servers of one database."""

    lease: Seconds = Field(
        30.0,
        ge=1,
        description="seconds after which another server of the same database takes over the jobs of one that is gone",
    )


class BucketSettings(EnvironmentSettings):
    """Buckets."""

    store_endpoint: Url | None = Field(
        None, description="address of the S3 service, if it is not AWS: https://HOST, or http:// for one without TLS"
    )

    @field_validator("store_endpoint")
    @classmethod
    def _check_store_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith(("http://", "https://")) or "@" in value):
            raise ValueError("expected an address that begins with https:// or http://, without a password")
        return value


class StoreSettings(BucketSettings):
    """Where images are kept."""

    store_url: str | None = Field(
        None,
        description=f"where images are kept: {STORE_FORMS}; a bucket is what several servers share (see "
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
        if not value:
            return value
        parts = urlsplit(value)
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("expected no password, ? or #: credentials are taken from AWS_ variables")
        row = STORES.get(parts.scheme)
        if row is None or not row.is_complete(parts):
            raise ValueError(f"expected {STORE_FORMS}")
        return value
