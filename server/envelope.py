"""The one envelope that every failure leaves in, and the headers beside it.

It is at once the hosted API's flat shape and OpenAI's nested one, so that the message is shown by the SDKs of both. A
framework's own error body never leaves the server. `server.error_table` says what each error is on the wire.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from pipelines import errors as pipeline
from server.error_table import UNEXPECTED, row_of

# Seconds. Longer advice is not obeyed: OpenAI's SDK for JavaScript and older ones for Python, and the AI SDK, then
# come back within a second or two, until they give up.
MIN_RETRY, MAX_RETRY = 1.0, 60.0
UNEXPECTED_NAME = "InternalError"
UNEXPECTED_MESSAGE = "Something went wrong in the server. Its log has the cause under this requestId."


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
            "name": type(error).__name__ if ours else UNEXPECTED_NAME,
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
