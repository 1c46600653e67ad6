"""What the OpenAPI document says of the routes that read their body themselves."""

from typing import Any

from server.schema import ErrorReply, GenerationBody, GenerationReply

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
GENERATION: dict[str, Any] = {
    "summary": "Generate images",
    "operation_id": "_v1_images_generations",
    "responses": {
        200: {"model": GenerationReply, "description": "Finished images, where success_status is 200."},
        201: {"model": GenerationReply, "description": "Finished images."},
        202: {"description": "Accepted as a job, under `Prefer: respond-async`; `poll_url` says where it is."},
        409: {"model": ErrorReply, "description": "The Idempotency-Key was used with another body."},
        **FAILURES,
    },
    "openapi_extra": {
        "security": [{"access-token": []}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": GenerationBody.model_json_schema()}},
        },
    },
}
JOBS: dict[str, Any] = {
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
    "responses": {400: FAILURES[400], 404: {"model": ErrorReply, "description": "No such model."}}
}
SECURITY = {"access-token": {"type": "http", "scheme": "bearer", "description": "Bearer key"}}
