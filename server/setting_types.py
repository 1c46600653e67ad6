"""What settings are made of: where they are read, and what the text of one may mean."""

from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def split_list(value: Any) -> Any:
    """Split text at its commas; any other value is returned unchanged."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def parse_bytes(value: Any) -> Any:
    """The bytes that text like 16MiB means; any other value is returned unchanged."""
    if isinstance(value, str) and value[-3:] in UNITS:
        return int(float(value[:-3]) * UNITS[value[-3:]])
    return value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_list)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]


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
