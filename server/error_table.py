"""One table from exception class to HTTP status and code: how each error leaves the server, and what it asks for."""

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class WireError:
    """How a class of errors looks on the wire. `repeats`: trying again would fail again.

    `refuses`: it is raised before any work, because of the server's or the operator's limits. `meaning`: what happened
    and what to do, for the page of the API.
    """

    status: int
    code: str | None
    meaning: str
    repeats: bool = False
    refuses: bool = False

    @property
    def type(self) -> str:
        """OpenAI's word for errors of this kind."""
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 499: "client_error"}
TABLE: Mapping[type[Exception], WireError] = {
    InvalidRequest: WireError(
        400, None, "A field is wrong: `error.param` names it, `error.data` lists all of them. Correct the request."
    ),
    MalformedRequest: WireError(
        400, "malformed_request", "This is no valid HTTP. Look at the client, or at the proxy before the server."
    ),
    pipeline.ContentWithheld: WireError(
        400,
        "content_policy_violation",
        "Every image was flagged (`SRPO_SAFETY_ACTION=error`). Try another seed or prompt.",
    ),
    pipeline.ImageTooLarge: WireError(
        400,
        "image_too_large",
        "The device has no memory for images of that size; the message says for which. Ask for a smaller one.",
    ),
    pipeline.PromptRefused: WireError(
        400,
        "prompt_refused",
        "The operator's list or moderation service does not allow the prompt. Change it.",
        refuses=True,
    ),
    UnknownHost: WireError(
        400,
        "unknown_host",
        "The `Host` of the request is not this server's. The operator names it by `SRPO_PUBLIC_URL`.",
    ),
    Unauthorized: WireError(
        401, "invalid_api_key", "The key is missing, unknown, revoked or over. Send a valid one as a bearer token."
    ),
    LinkRefused: WireError(
        403,
        "link_refused",
        "The signature of an image's address is wrong or over. Ask for the reply again: it has a new one.",
    ),
    ScopeMissing: WireError(
        403, "insufficient_scope", "The key is valid, and not for this. The message names the scope that it needs."
    ),
    QuotaSpent: WireError(
        403,
        "insufficient_quota",
        "The key has had its images for today. Wait until 00:00 UTC, or ask the operator for more.",
        refuses=True,
    ),
    ForeignOrigin: WireError(
        403,
        "foreign_origin",
        "A foreign web page called a server without keys. The operator allows it by `SRPO_CORS_ORIGINS`.",
    ),
    NotFound: WireError(
        404, "not_found", "There is nothing at this path: no such route, model, job or image, or it is another key's."
    ),
    MethodNotAllowed: WireError(405, "method_not_allowed", "The route knows other methods. `allow` lists them."),
    BodyTimeout: WireError(
        408,
        "body_timeout",
        "The body did not arrive within `SRPO_BODY_TIMEOUT`. Look at the client's connection.",
        repeats=True,
    ),
    HeaderTimeout: WireError(
        408,
        "header_timeout",
        "The headers did not arrive within `SRPO_HEADER_TIMEOUT`. Look at the client's connection.",
        repeats=True,
    ),
    pipeline.WorkersBusy: WireError(
        409,
        "workers_busy",
        "Workers cannot be put to sleep while requests are unfinished. Try again after them.",
        repeats=True,
    ),
    pipeline.CannotSleep: WireError(
        409, "cannot_sleep", "The engines of a cluster do not sleep. Stop the cluster instead."
    ),
    JobCancelled: WireError(
        409,
        "cancelled",
        "Somebody cancelled the job that this request waited for. Send it anew.",
        repeats=True,
    ),
    KeyReused: WireError(
        409, "idempotency_key_reused", "The `Idempotency-Key` was used with another body. Take a new one.", repeats=True
    ),
    Gone: WireError(410, "expired", "The image or job has expired. Draw it again: with the same seed it is the same."),
    BodyTooLarge: WireError(
        413,
        "body_too_large",
        "The body is larger than `SRPO_MAX_BODY`, or the picture in a form than `SRPO_MAX_UPLOAD`. Send less.",
    ),
    BadRange: WireError(416, "range_not_satisfiable", "The range is outside of the image. Ask for the whole file."),
    KeyLimitReached: WireError(
        429,
        "rate_limit_exceeded",
        "The key has as many unfinished requests as it may (`SRPO_KEY_REQUESTS`). Wait for `retry-after`.",
        refuses=True,
    ),
    KeyRateReached: WireError(
        429,
        "rate_limit_exceeded",
        "The key has sent its requests of this minute (`SRPO_KEY_RATE`). Wait for `retry-after`.",
        refuses=True,
    ),
    pipeline.QueueFull: WireError(
        429, "queue_full", "As many requests wait as may (`SRPO_QUEUE_SIZE`). Wait for `retry-after`.", refuses=True
    ),
    ClientDisconnect: WireError(499, "client_gone", "The client left while it sent its request. It gets no reply."),
    pipeline.Cancelled: WireError(
        499, "cancelled", "The client left while it waited. It gets no reply; also the `error` of a cancelled job."
    ),
    pipeline.GenerationFailed: WireError(
        500,
        "generation_failed",
        "The engine could not draw this request. The log has the cause; report it.",
        repeats=True,
    ),
    pipeline.OutOfMemory: WireError(
        500,
        "out_of_memory",
        "The request does not fit the device. Ask for a smaller size or fewer images.",
        repeats=True,
    ),
    pipeline.NonFinitePixels: WireError(
        500,
        "non_finite_pixels",
        "The numbers of this request blew up. Try another seed; if it is often, `srpo selfcheck`.",
        repeats=True,
    ),
    pipeline.ConstantImage: WireError(
        500,
        "constant_image",
        "An image was all of one colour (`SRPO_CONSTANT_IMAGES=error`). Try another seed or prompt.",
        repeats=True,
    ),
    pipeline.WorkerCrashed: WireError(
        500,
        "worker_crashed",
        "The request took its worker down twice and was given up. The log says why; others are drawn.",
        repeats=True,
    ),
    pipeline.NotReady: WireError(
        503,
        "not_ready",
        "The model is being loaded; `stage`, `progress` and `eta_seconds` say how far it is. Wait.",
        refuses=True,
    ),
    pipeline.WorkersSuspended: WireError(
        503,
        "workers_suspended",
        "Workers died again and again; one is tried every minute. The operator looks at `/health` and the log.",
        refuses=True,
    ),
    pipeline.Draining: WireError(
        503,
        "draining",
        "The server is going down. Try again: the next start, or another server, answers.",
        refuses=True,
    ),
    pipeline.SafetyUnavailable: WireError(
        503,
        "safety_unavailable",
        "The checker failed or hung, so nothing is shown. The operator looks for `safety` in the log.",
    ),
    StorageFull: WireError(503, "storage_full", "The disk is full or cannot be written. The operator makes room."),
    StorageBusy: WireError(503, "storage_busy", "Another program has locked the job database. The operator ends it."),
    StorageDamaged: WireError(
        503, "storage_damaged", "The job database cannot be read. The operator restores a [backup](upkeep.md#backups)."
    ),
    DatabaseUnavailable: WireError(
        503, "database_unavailable", "The database does not answer. The operator sees whether Postgres is there."
    ),
    StoreUnavailable: WireError(
        503,
        "store_unavailable",
        "The bucket does not answer. The operator sees whether it is there, and its credentials.",
    ),
    UploadsFull: WireError(
        503, "uploads_full", "The bodies in progress take all of `SRPO_UPLOADS`. Try again soon.", refuses=True
    ),
    TooManyConnections: WireError(
        503, "too_many_connections", "`SRPO_MAX_CONNECTIONS` are open and busy. Try again in a second.", refuses=True
    ),
    pipeline.DeadlineExceeded: WireError(
        504,
        "deadline_exceeded",
        "It was not finished within `SRPO_REQUEST_TIMEOUT`. Ask for less, or when fewer wait.",
        repeats=True,
    ),
}
UNEXPECTED = WireError(
    500, "internal_error", "The server itself is at fault. Its log has the cause under the `requestId`; report it."
)


def row_of(error: Exception) -> WireError:
    return TABLE.get(type(error), UNEXPECTED)
