"""One table from exception class to HTTP status and code, and the one envelope every failure leaves in.

The envelope is at once the hosted API's flat shape and OpenAI's nested one, so that the message is shown by the SDKs
of both. A framework's own error body never leaves the server.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from starlette.requests import ClientDisconnect

from pipelines import errors as pipeline
from server.errors import (
    BadRange,
    BodyTimeout,
    BodyTooLarge,
    DatabaseUnavailable,
    ForeignOrigin,
    Gone,
    HeaderTimeout,
    InvalidRequest,
    JobCancelled,
    KeyLimitReached,
    KeyRateReached,
    KeyReused,
    LinkRefused,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    QuotaSpent,
    ScopeMissing,
    StorageBusy,
    StorageDamaged,
    StorageFull,
    StoreUnavailable,
    TooManyConnections,
    Unauthorized,
    UnknownHost,
    UploadsFull,
)

# Seconds. Longer advice is not obeyed: OpenAI's SDK for JavaScript and older ones for Python, and the AI SDK, then
# come back within a second or two, until they give up.
MIN_RETRY, MAX_RETRY = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class WireError:
    """How a class of errors looks on the wire. `repeats`: trying again would fail again.

    `refuses`: it is raised before any work, because of the server's or the operator's limits.
    """

    status: int
    code: str | None
    type: str
    repeats: bool = False
    refuses: bool = False


TABLE: Mapping[type[Exception], WireError] = {
    InvalidRequest: WireError(400, None, "invalid_request_error"),
    MalformedRequest: WireError(400, "malformed_request", "invalid_request_error"),
    pipeline.ContentWithheld: WireError(400, "content_policy_violation", "invalid_request_error"),
    pipeline.ImageTooLarge: WireError(400, "image_too_large", "invalid_request_error"),
    pipeline.PromptRefused: WireError(400, "prompt_refused", "invalid_request_error", refuses=True),
    UnknownHost: WireError(400, "unknown_host", "invalid_request_error"),
    Unauthorized: WireError(401, "invalid_api_key", "authentication_error"),
    LinkRefused: WireError(403, "link_refused", "permission_error"),
    ScopeMissing: WireError(403, "insufficient_scope", "permission_error"),
    QuotaSpent: WireError(403, "insufficient_quota", "permission_error", refuses=True),
    ForeignOrigin: WireError(403, "foreign_origin", "permission_error"),
    NotFound: WireError(404, "not_found", "invalid_request_error"),
    MethodNotAllowed: WireError(405, "method_not_allowed", "invalid_request_error"),
    BodyTimeout: WireError(408, "body_timeout", "invalid_request_error", repeats=True),
    HeaderTimeout: WireError(408, "header_timeout", "invalid_request_error", repeats=True),
    pipeline.WorkersBusy: WireError(409, "workers_busy", "invalid_request_error", repeats=True),
    pipeline.CannotSleep: WireError(409, "cannot_sleep", "invalid_request_error"),
    JobCancelled: WireError(409, "cancelled", "invalid_request_error", repeats=True),
    KeyReused: WireError(409, "idempotency_key_reused", "invalid_request_error", repeats=True),
    Gone: WireError(410, "expired", "invalid_request_error"),
    BodyTooLarge: WireError(413, "body_too_large", "invalid_request_error"),
    BadRange: WireError(416, "range_not_satisfiable", "invalid_request_error"),
    KeyLimitReached: WireError(429, "rate_limit_exceeded", "rate_limit_error", refuses=True),
    KeyRateReached: WireError(429, "rate_limit_exceeded", "rate_limit_error", refuses=True),
    pipeline.QueueFull: WireError(429, "queue_full", "rate_limit_error", refuses=True),
    ClientDisconnect: WireError(499, "client_gone", "client_error"),
    pipeline.Cancelled: WireError(499, "cancelled", "client_error"),
    pipeline.GenerationFailed: WireError(500, "generation_failed", "server_error", repeats=True),
    pipeline.OutOfMemory: WireError(500, "out_of_memory", "server_error", repeats=True),
    pipeline.NonFinitePixels: WireError(500, "non_finite_pixels", "server_error", repeats=True),
    pipeline.ConstantImage: WireError(500, "constant_image", "server_error", repeats=True),
    pipeline.WorkerCrashed: WireError(500, "worker_crashed", "server_error", repeats=True),
    pipeline.NotReady: WireError(503, "not_ready", "server_error", refuses=True),
    pipeline.WorkersSuspended: WireError(503, "workers_suspended", "server_error", refuses=True),
    pipeline.Draining: WireError(503, "draining", "server_error", refuses=True),
    pipeline.SafetyUnavailable: WireError(503, "safety_unavailable", "server_error"),
    StorageFull: WireError(503, "storage_full", "server_error"),
    StorageBusy: WireError(503, "storage_busy", "server_error"),
    StorageDamaged: WireError(503, "storage_damaged", "server_error"),
    DatabaseUnavailable: WireError(503, "database_unavailable", "server_error"),
    StoreUnavailable: WireError(503, "store_unavailable", "server_error"),
    UploadsFull: WireError(503, "uploads_full", "server_error", refuses=True),
    TooManyConnections: WireError(503, "too_many_connections", "server_error", refuses=True),
    pipeline.DeadlineExceeded: WireError(504, "deadline_exceeded", "server_error", repeats=True),
}
UNEXPECTED = WireError(500, "internal_error", "server_error")
UNEXPECTED_MESSAGE = "Something went wrong in the server. Its log has the cause under this requestId."


def row_of(error: Exception) -> WireError:
    return TABLE.get(type(error), UNEXPECTED)


def envelope(error: Exception, request_id: str, path: str) -> dict[str, Any]:
    """The body of a failed request. Only our own classes say more than their row: others' `code` is not for clients."""
    row = row_of(error)
    ours = error if row is not UNEXPECTED else None
    message = UNEXPECTED_MESSAGE if row is UNEXPECTED else str(error)
    title = HTTPStatus(row.status).phrase if row.status != 499 else "Client Closed Request"
    extra = (
        {"stage": error.stage, "progress": round(error.progress, 3), "eta_seconds": round(error.retry_after, 1)}
        if (isinstance(error, pipeline.NotReady))
        else {}
    )
    return {
        "requestId": request_id,
        "statusCode": row.status,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "path": path,
        "message": message,
        "title": title,
        "status": row.status,
        "instance": path,
        "error": {
            "message": message,
            "type": row.type,
            "param": getattr(ours, "param", None),
            "code": getattr(ours, "code", row.code),
            "name": type(error).__name__ if ours else "InternalError",
            "data": getattr(ours, "issues", []),
        },
        **extra,
    }


def readdress(body: Mapping[str, Any], request_id: str, path: str) -> dict[str, Any]:
    """The envelope of a job that failed, as the answer to a request."""
    return {**body, "requestId": request_id, "path": path, "instance": path}


def headers_of(error: Exception) -> dict[str, str]:
    """Retry advice that OpenAI's SDKs obey, and the error's own headers."""
    row = row_of(error)
    if row is UNEXPECTED:
        return {}
    headers = dict(getattr(error, "headers", {}))
    if (seconds := getattr(error, "retry_after", None)) is not None:
        wait = min(MAX_RETRY, max(MIN_RETRY, seconds))
        headers |= {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}
    if row.repeats:
        headers["x-should-retry"] = "false"
    return headers
