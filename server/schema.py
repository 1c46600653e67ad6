"""What goes over the wire as JSON: the bodies of requests, and the replies.

`GenerationBody` is `GenerationParams` plus `model`, `ImageToImageBody` is `ImageToImageParams` plus `model`; they add
no parameter of their own. OpenAI's and other spellings are translated before (`server.translation`), so that native
fields can be strict.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from pipelines.fields import Issue
from pipelines.request import PARAM_TYPES, GenerationParams, ImageRequest, ImageToImageParams, for_model
from pipelines.safety.guard import InspectedResult
from server.detailed_reply import DetailedReply
from server.errors import InvalidRequest
from server.settings.server import Settings
from server.translation.model_names import IMAGE_TO_IMAGE, params_of
from weights.checkpoints import CHECKPOINTS, HOSTED_MODEL

MAX_RECEIVED = 80
CREDITS_PER_USD = 2_000_000
MEGAPIXEL = 2**20
EXAMPLE: dict[str, Any] = {
    "model": HOSTED_MODEL,
    "prompt": CHECKPOINTS[HOSTED_MODEL].sample_prompt,
}
SOURCED_EXAMPLE: dict[str, Any] = {
    "model": HOSTED_MODEL + IMAGE_TO_IMAGE,
    "prompt": "The same harbour in winter, oil on canvas.",
    "image_url": "https://example.com/harbour.jpg",
    "strength": 0.8,
}


class GenerationBody(GenerationParams):
    """A request for images. Unknown fields are ignored and named in the response header `x-ignored-fields`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [EXAMPLE, EXAMPLE | {"image_size": {"width": 1440, "height": 512}}]}
    )

    model: str = Field(description="The model's id.", json_schema_extra={"enum": [HOSTED_MODEL]})


class ImageToImageBody(ImageToImageParams):
    """A request for images that begin at a picture, whose size they take."""

    model_config = ConfigDict(json_schema_extra={"examples": [SOURCED_EXAMPLE]})

    model: str = Field(description="The model's id.", json_schema_extra={"enum": [HOSTED_MODEL + IMAGE_TO_IMAGE]})


Body = GenerationBody | ImageToImageBody


@cache
def body_of(served: str, sourced: bool) -> type[Body]:
    """The body with the bounds and defaults of the loaded model, which answers to its own name and to flux/srpo.

    `sourced`: the body of image-to-image.
    """
    kind: type[Body] = ImageToImageBody if sourced else GenerationBody
    body = for_model(served, kind)
    if served == HOSTED_MODEL or CHECKPOINTS[served].embedded:
        return body
    suffix = IMAGE_TO_IMAGE if sourced else ""
    names: dict[str, Any] = {"enum": [served + suffix, HOSTED_MODEL + suffix]}
    model: Any = (str, Field(description=kind.model_fields["model"].description, json_schema_extra=names))
    return create_model(kind.__name__, __base__=body, __module__=__name__, model=model)


def read_body(native: dict[str, Any], served: str, aliases: Iterable[str] = ()) -> Body:
    """Validate native fields. `served` is the id of the loaded model; `aliases` are its other names, for the error.

    Raises `InvalidRequest`.
    """
    issues = list(model_issues(native, served, aliases))
    sourced = params_of(native.get("model")) is ImageToImageParams
    fields = native | {"model": HOSTED_MODEL} if issues else native
    try:
        body: Body = body_of(served, sourced).model_validate(fields)
    except ValidationError as error:
        issues += [issue for detail in error.errors(include_url=False) for issue in issues_of(detail)]
    if issues:
        raise InvalidRequest(issues)
    return body


def model_ids(served: str) -> list[str]:
    """What the loaded model is called: by its id, by the hosted API's, and by either for image-to-image."""
    names = dict.fromkeys((HOSTED_MODEL, served))
    return [name + kind for name in names for kind in ("", IMAGE_TO_IMAGE)]


def model_issues(native: dict[str, Any], served: str, aliases: Iterable[str]) -> Sequence[dict[str, Any]]:
    """What is wrong with `model`: missing, not a name, or not the one that is served."""
    known = model_ids(served)
    expected = f"one of {', '.join([*known, *aliases])}"
    if "model" not in native:
        return [issue_of("required", ("model",), Issue((), expected, None), missing=True)]
    model = native["model"]
    if isinstance(model, str) and model in known:
        return []
    code = "model_not_found" if isinstance(model, str) else "invalid_choice"
    if isinstance(model, str) and model in CHECKPOINTS:
        expected += f" ({model} is not loaded here)"
    return [issue_of(code, ("model",), Issue((), expected, model))]


def issues_of(detail: Any) -> Sequence[dict[str, Any]]:
    """Our issues from one of pydantic's errors."""
    loc = tuple(detail["loc"])
    if detail["type"] == "missing":
        return [issue_of("required", loc, Issue((), PARAM_TYPES[str(loc[0])].expected, None), missing=True)]
    return [issue_of(detail["type"], loc, issue) for issue in detail["ctx"]["issues"]]


def issue_of(code: str, loc: tuple[Any, ...], issue: Issue, missing: bool = False) -> dict[str, Any]:
    received = "nothing" if missing else short(issue.received)
    return {
        "code": code,
        "path": [*loc, *issue.path],
        "message": f"expected {issue.expected}, received {received}",
        "expected": issue.expected,
        "received": received,
    }


def short(value: Any) -> str:
    """A repr of at most 80 ASCII characters: never the raw value, never an expensive one."""
    if isinstance(value, str):
        text = ascii(value[:MAX_RECEIVED]) if len(value) <= MAX_RECEIVED else f"a string of {len(value)} characters"
    elif isinstance(value, list | dict):
        text = f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)} items"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int) and abs(value) >= 10**MAX_RECEIVED:
        text = "a very large integer"
    else:
        text = ascii(value)
    return text if len(text) <= MAX_RECEIVED else text[: MAX_RECEIVED - 3] + "..."


class ImageItem(BaseModel):
    """One image. `url` or `b64_json` is there, or both where `response_format` says so; never a null."""

    url: str | None = Field(None, description="Where the file is, or a data URI under sync_mode.")
    b64_json: str | None = Field(None, description="The file in base64, under response_format b64_json.")
    width: int
    height: int
    content_type: str


class Usage(BaseModel):
    """The hosted API's price for these images, in its credits."""

    tokens_used: int
    credits_used: int
    usd_spent: float

    @classmethod
    def of(cls, request: ImageRequest, settings: Settings) -> "Usage":
        """Credits for each started megapixel (2^20 pixels) of each image."""
        megapixels = -(-request.width * request.height // MEGAPIXEL)
        used = settings.credits_per_megapixel * megapixels * len(request.seeds)
        return cls(tokens_used=used, credits_used=used, usd_spent=used / CREDITS_PER_USD)


class Meta(BaseModel):
    usage: Usage


class Safety(BaseModel):
    """Whether the images were checked, so that `false` in has_nsfw_concepts cannot be misread."""

    checked: bool
    checker: str
    threshold: float | None = None
    action: str | None = None


class GenerationReply(DetailedReply):
    """The finished images. `images` and `data` are the same list: some clients read only one of them."""

    created: int
    images: list[ImageItem]
    timings: dict[str, float | list[str]]
    seed: int
    has_nsfw_concepts: list[bool]
    prompt: str
    data: list[ImageItem]
    meta: Meta
    safety: Safety

    @classmethod
    def from_result(
        cls, inspected: InspectedResult, items: list[ImageItem], seconds: dict[str, float], settings: Settings
    ) -> "GenerationReply":
        """`seconds` are those spent after the pixels were finished, by stage."""
        result = inspected.result
        measured = asdict(result.timings) | seconds
        timings: dict[str, float | list[str]] = {name: round(value, 4) for name, value in measured.items()}
        if result.notes:
            timings["notes"] = list(result.notes)
        return cls(
            created=int(time.time()),
            images=items,
            timings=timings,
            seed=result.request.seeds[0],
            has_nsfw_concepts=list(inspected.flagged),
            prompt=result.request.prompt,
            data=items,
            meta=Meta(usage=Usage.of(result.request, settings)),
            safety=Safety(**asdict(inspected.verdict)),
        )

    @property
    def length(self) -> int:
        """Characters of the images and the prompt, which are nearly all of the reply."""
        return len(self.prompt) + sum(len(item.url or "") + len(item.b64_json or "") for item in self.images)

    def text(self) -> str:
        """The body of the reply."""
        return self.model_dump_json(exclude_none=True)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    name: str
    data: list[dict[str, Any]]


class ErrorReply(BaseModel):
    """The one envelope of every failure."""

    requestId: str  # noqa: N815 - the wire's own spelling
    statusCode: int  # noqa: N815
    timestamp: str
    path: str
    message: str
    title: str
    status: int
    instance: str
    error: ErrorDetail


class WebhookReply(BaseModel):
    """How the telling of a job's end goes. It is pending until the receiver takes it, for most of a day."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["waiting", "pending", "delivered", "failed"]
    attempts: int
    last_status: int | None = Field(None, description="What the receiver answered last, where it did.")
    next_attempt_at: int | None = Field(None, description="Unix seconds, while it is pending.")
    delivered_at: int | None = Field(None, description="Unix seconds, when it is delivered.")


class JobReply(BaseModel):
    """A durable job. It has `reply` or `error` when it has ended, and the others of its optional fields before."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: Literal["job"]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int = Field(description="Unix seconds.")
    finished_at: int | None = Field(None, description="Unix seconds, when it has ended.")
    model: str | None
    poll_url: str
    events_url: str
    queue_position: int | None = Field(None, description="Requests ahead of it in the line.")
    eta_seconds: float | None = Field(None, description="Predicted seconds until it is finished.")
    progress: dict[str, Any] | None = Field(None, description="The newest progress event.")
    webhook: WebhookReply | None = Field(None, description="Where the job came with a webhook_url.")
    reply: GenerationReply | None = Field(None, description="The body that the plain call would have had.")
    error: ErrorReply | None = Field(None, description="The envelope that the plain call would have had.")


class JobPage(BaseModel):
    """Jobs without `reply` and `error`, newest first."""

    model_config = ConfigDict(extra="forbid")

    object: Literal["list"]
    data: list[JobReply]
    has_more: bool
    next_cursor: str | None = Field(None, description="`after` of the next page, where there is one.")
