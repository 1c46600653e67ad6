"""The settings of a cluster: those of a server, and how many replicas there are of what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, model_validator

from server.settings.server import Settings
from server.settings.types import PREFIX, EnvironmentSettings, Seconds


class EngineCount(EnvironmentSettings):
    """The engines of a cluster."""

    engines: int = Field(1, ge=1, description="how many engines there are")
    engine_gpus: float = Field(1.0, ge=0, description="GPUs that Ray gives each engine; 0: none, it draws on the CPU")

    @property
    def gpus(self) -> float:
        """Those of all engines together."""
        return self.engines * self.engine_gpus


class ClusterSettings(EngineCount, Settings):
    """Serve from several processes, each engine with a device of its own (see docs/cluster.md)."""

    apis: int = Field(1, ge=1, description="how many replicas answer HTTP")
    engine_timeout: Seconds = Field(
        30.0, gt=0, description="seconds without a sign of an engine that has begun a request, then another one gets it"
    )

    @model_validator(mode="after")
    def _check_truth(self) -> "ClusterSettings":
        if self.database_url is None or not (self.store_url or "").startswith("s3://"):
            raise ValueError(
                "a cluster keeps its jobs in Postgres and its images in a bucket: set SRPO_DATABASE_URL "
                "(postgresql://...) and SRPO_STORE_URL (s3://...)"
            )
        if self.link_lifetime is not None and not self.link_secrets:
            raise ValueError("link_lifetime needs link_secrets in a cluster: all replicas sign alike")
        if self.idle_release is not None:
            raise ValueError("idle_release cannot be had in a cluster: its engines do not sleep")
        if self.metrics_port is not None:
            raise ValueError("metrics_port cannot be had in a cluster: read /metrics with a key")
        return self

    def to_environment(self) -> Mapping[str, str]:
        """The variables that say what these settings say. Replicas read them, so that no secret goes through Ray."""
        return {PREFIX + name.upper(): format_value(getattr(self, name)) for name in sorted(self.model_fields_set)}


def format_value(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case SecretStr():
            return value.get_secret_value()
        case tuple():
            return ",".join(map(str, value))
        case Path():
            return str(value.absolute())
        case _:
            return "" if value is None else str(value)
