"""How requests are answered, and how long images are kept. Part of the settings."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from server.settings.types import COMMON, Bytes, EnvironmentSettings, Metavar, Names, Seconds
from weights.checkpoints import CHECKPOINTS, HOSTED_MODEL


class ReplySettings(EnvironmentSettings):
    """Images and replies."""

    response_format: Literal["url", "b64_json", "both"] = Field(
        "url", description="how images come back if the request does not say it: url, b64_json or both"
    )
    model_aliases: Annotated[Names, Metavar("NAME=MODEL[,...]")] = Field(
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
    no_fetch: bool = Field(
        False, description="never fetch source pictures from the internet; image-to-image then accepts data URIs only"
    )
    images_expire: Seconds = Field(
        86400.0,
        gt=0,
        description="seconds (or 90s, 15m, 2h, 7d) after which a stored image is deleted",
        json_schema_extra=COMMON,
    )
    images_cap: Bytes = Field(
        10 * 2**30, gt=0, description="disk space for images (10GiB); above it the oldest images are deleted"
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
