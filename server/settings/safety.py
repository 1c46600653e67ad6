"""What is checked, and what becomes of what is flagged. Part of the settings."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from pipelines.fields import Choice
from pipelines.safety.checkers import parse_checkers
from pipelines.safety.guard import ACTIONS, POLICIES
from server.settings.types import COMMON, EnvironmentSettings, Names, Seconds, Url, describe_choices


class SafetySettings(EnvironmentSettings):
    """Safety."""

    safety_checker: str = Field(
        "embedded",
        description="what checks images: embedded (open_nsfw: photographic nudity only), folder:PATH, compvis:PATH, "
        "hook:URL, several of them separated by commas, or none",
        json_schema_extra=COMMON,
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
    safety_policy: Annotated[str, Choice(tuple(POLICIES))] = Field(
        "client",
        description=f"which images are checked: {describe_choices(POLICIES)}",
    )
    safety_action: Annotated[str, Choice(tuple(ACTIONS))] = Field(
        "black",
        description="what happens to a flagged image: "
        + describe_choices({name: action.description for name, action in ACTIONS.items()}),
    )
    safety_timeout: Seconds = Field(
        10.0,
        gt=0,
        description="seconds that the check of a prompt or of an image may take, without its wait for others; then the "
        "answer is 503",
    )
    prompt_hook: Url | None = Field(None, description="URL of a moderation service that judges each prompt")
    prompt_list: Path | None = Field(
        None, description="file with words and /regular expressions/, one a line, that no prompt may contain"
    )

    @field_validator("safety_checker")
    @classmethod
    def _check_checker(cls, value: str) -> str:
        parse_checkers(value)
        return value
