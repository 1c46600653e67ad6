"""Where a server keeps its records, and how several servers share them. Part of the settings."""

from typing import Any

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
