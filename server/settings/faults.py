"""What is done about workers that stop or have nothing to do, and files that are damaged. Part of the settings."""

from typing import Literal

from pydantic import Field

from server.settings.types import EnvironmentSettings, Seconds


class WorkerSettings(EnvironmentSettings):
    """Workers."""

    step_timeout: Seconds = Field(
        120.0,
        gt=0,
        description="seconds a step may take, then its worker is restarted; more where steps were slow or none was yet",
    )
    worker_timeout: Seconds = Field(
        30.0, gt=0, description="seconds without any sign of a worker, then it is restarted"
    )

    idle_release: Seconds | None = Field(
        None,
        gt=0,
        description="seconds (or 90s, 15m, 2h) without a request, after which the workers are ended and all their "
        "memory is free; the next request starts them again and waits for them; none: never",
    )


class DamageSettings(EnvironmentSettings):
    """A data folder that is not sound."""

    damaged_data: Literal["refuse", "move"] = Field(
        "refuse",
        description="what a start does with a job database or engine.json that cannot be read: refuse to start, or "
        "move the file aside and begin with a new one",
    )
