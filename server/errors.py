"""The errors that belong to HTTP, each raised where it is known. `server.error_table` says how each leaves."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class ServerError(Exception):
    """Base of the errors that belong to HTTP. `headers` go out with the reply."""

    headers: Mapping[str, str] = MappingProxyType({})


class InvalidRequest(ServerError):
    """The body or one of its fields is wrong. `issues` are `{code, path, message, expected, received}`."""

    def __init__(self, issues: list[dict[str, Any]], code: str | None = None) -> None:
        first = issues[0]
        dotted = ".".join(str(part) for part in first["path"])
        more = f" (and {len(issues) - 1} more)" if len(issues) > 1 else ""
        super().__init__(f"{dotted or 'body'}: {first['message']}{more}")
        self.issues = issues
        self.param = dotted or None
        self.code = code or first["code"]


def invalid_request(
    message: str, *, path: tuple[str, ...] = (), code: str, expected: str, received: str
) -> InvalidRequest:
    """The error for one thing wrong, at `path` in the body."""
    return InvalidRequest(
        [{"code": code, "path": list(path), "message": message, "expected": expected, "received": received}]
    )


class Unauthorized(ServerError):
    headers: Mapping[str, str] = MappingProxyType({"www-authenticate": "Bearer"})

    def __init__(self) -> None:
        super().__init__("This request requires a valid API key.")


class ScopeMissing(ServerError):
    def __init__(self, scope: str, *, keyless: bool = False) -> None:
        """`keyless`: on a server that has no keys yet, so that nobody can have the scope."""
        advice = f" `srpo keys add NAME --scopes {scope}` makes one." if keyless else ""
        super().__init__(f"This needs a key with the scope {scope}.{advice}")


class QuotaSpent(ServerError):
    def __init__(self, quota: int, left: int) -> None:
        super().__init__(
            f"This key may draw {quota} images a day. {left} of them are left until 00:00 UTC, fewer than asked for."
        )


class ForeignOrigin(ServerError):
    def __init__(self) -> None:
        super().__init__(
            "This server has no API keys, so it takes requests only from its own pages. "
            "Set SRPO_CORS_ORIGINS, or keys, to call it from other origins."
        )


class LinkRefused(ServerError):
    def __init__(self) -> None:
        super().__init__(
            "This image address is not valid, or no longer. A reply that is asked for again has a new one."
        )


class MalformedRequest(ServerError):
    def __init__(self) -> None:
        super().__init__("This is not a valid HTTP request.")


class UnknownHost(ServerError):
    def __init__(self) -> None:
        super().__init__("This server answers only to its own host names. Set SRPO_PUBLIC_URL to add one.")


class NotFound(ServerError):
    def __init__(self, what: str = "There is nothing at this path.") -> None:
        super().__init__(what)


class MethodNotAllowed(ServerError):
    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"{method} is not allowed here. Allowed: {allowed}.")
        self.headers = {"allow": allowed}


class Gone(ServerError):
    def __init__(self, what: str = "This image has expired and was deleted.") -> None:
        super().__init__(what)


class JobCancelled(ServerError):
    """Somebody cancelled the job that a client waits for."""

    def __init__(self) -> None:
        super().__init__("The job of this request was cancelled.")


class KeyReused(ServerError):
    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with another body. Take a new key for a new request.")


class BodyTimeout(ServerError):
    headers: Mapping[str, str] = MappingProxyType({"connection": "close"})

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request body did not arrive within {seconds:.0f} s.")


class HeaderTimeout(ServerError):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request's headers did not arrive within {seconds:.0f} s.")


class TooManyConnections(ServerError):
    retry_after = 1.0  # seconds

    def __init__(self) -> None:
        super().__init__("The server has as many connections as it takes. Try again in a second.")


class BodyTooLarge(ServerError):
    headers: Mapping[str, str] = MappingProxyType({"connection": "close"})

    def __init__(self, limit: int, what: str) -> None:
        super().__init__(f"{what} is larger than {limit:,} bytes.")


class KeyLimitReached(ServerError):
    def __init__(self, requests: int, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(f"This key has {requests} unfinished requests, which is all that it may have at a time.")


class KeyRateReached(ServerError):
    def __init__(self, requests: int, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(f"This key may send {requests} requests a minute, and has sent them.")


class UploadsFull(ServerError):
    retry_after = 5.0  # seconds

    def __init__(self) -> None:
        super().__init__("The uploads in progress take all the memory that the server has for them. Try again soon.")


class BadRange(ServerError):
    def __init__(self, size: int) -> None:
        super().__init__(f"The range is outside the image's {size} bytes.")
        self.headers = {"content-range": f"bytes */{size}"}


class StorageFailure(ServerError):
    """What is kept cannot be read or written now. Later it may go well."""


class StorageFull(StorageFailure):
    retry_after = 30.0  # seconds

    def __init__(self) -> None:
        super().__init__("The server could not write: its disk is full or not writable. Try again later.")


class StorageBusy(StorageFailure):
    retry_after = 5.0  # seconds

    def __init__(self) -> None:
        super().__init__("The job database is locked by another program. Try again in a few seconds.")


class StorageDamaged(StorageFailure):
    retry_after = 30.0  # seconds

    def __init__(self) -> None:
        super().__init__("The job database is damaged. The server's operator finds in docs/upkeep.md what to do.")


class DatabaseUnavailable(StorageFailure):
    retry_after = 5.0  # seconds

    def __init__(self) -> None:
        super().__init__("The database cannot be reached now. Try again in a few seconds.")


class StoreUnavailable(StorageFailure):
    retry_after = 5.0  # seconds

    def __init__(self) -> None:
        super().__init__("The image store cannot be reached now. Try again in a few seconds.")
