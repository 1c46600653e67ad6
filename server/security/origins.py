"""Which web pages may call the API, and which host names the server answers: CORS and DNS rebinding.

With keys, any origin may call (the key is the proof). Without keys, only this server's own pages may, and on loopback
only its own host names count, so that no web page can use a visitor's local server.
"""

import re
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Scope

from server.errors import ForeignOrigin, UnknownHost
from server.settings.server import Settings

METHODS = "GET, POST, DELETE, HEAD, OPTIONS"
EXPOSED = (
    "x-request-id, x-inference-id, x-client-request-id, x-aimlapi-credits-used, x-aimlapi-usd-spent, x-served-model, "
    "x-engine-fingerprint, x-ignored-fields, retry-after, retry-after-ms, x-should-retry, location, "
    "content-location, idempotent-replayed"
)
PREFLIGHT_SECONDS = "600"
NETLOC = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:/@?#\\\s]*)(?::[0-9]{1,5})?")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class OriginPolicy:
    """Decides which hosts and origins are answered, and what image URLs begin with.

    `needs_key` says whether a request needs a key: the first one of the database closes an open server.
    """

    def __init__(self, settings: Settings, needs_key: Callable[[], bool]) -> None:
        self._public_url = settings.public_url
        self._needs_key = needs_key
        self._origins = settings.cors_origins
        self._hosts: tuple[str, ...] = LOOPBACK_NAMES if settings.is_loopback else ()
        if settings.is_loopback and settings.public_url:
            self._hosts += (host_of(urlsplit(settings.public_url).netloc),)

    def check_request(self, scope: Scope, headers: Headers) -> None:
        """Raises `UnknownHost` if the host name is not this server's.

        Raises `ForeignOrigin` if another site sends a request that changes something, and no key is required.
        """
        if self._hosts and host_of(headers.get("host", "")) not in self._hosts:
            raise UnknownHost
        origin = headers.get("origin")
        unsafe = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if origin and unsafe and not self._needs_key() and not self._is_allowed(origin, scope, headers):
            raise ForeignOrigin

    def cors(self, scope: Scope, headers: Headers, reply: MutableHeaders) -> None:
        """Add the CORS headers for the origin of the request to the reply."""
        origin = headers.get("origin")
        if scope["path"].startswith("/files/"):
            reply["access-control-allow-origin"] = "*"  # the names are unguessable
        elif origin and self._is_allowed(origin, scope, headers):
            reply["access-control-allow-origin"] = "*" if "*" in self._allowed else origin
            reply.add_vary_header("Origin")
        else:
            return
        reply["access-control-expose-headers"] = EXPOSED
        if scope["method"] == "OPTIONS":
            reply["access-control-allow-methods"] = METHODS
            reply["access-control-allow-headers"] = headers.get("access-control-request-headers", "*")
            reply["access-control-max-age"] = PREFLIGHT_SECONDS

    def base_url(self, scope: Scope, headers: Headers) -> str:
        """What image URLs begin with: `public_url`, else the checked host name, else the address of the socket."""
        if self._public_url:
            return self._public_url
        host = headers.get("host", "") if self._hosts else ""
        return f"{scope['scheme']}://{host or socket_address(scope)}"

    @property
    def _allowed(self) -> tuple[str, ...]:
        """The origins of other sites."""
        if self._origins is not None:
            return self._origins
        return ("*",) if self._needs_key() else ()

    def _is_allowed(self, origin: str, scope: Scope, headers: Headers) -> bool:
        own = {f"{scope['scheme']}://{headers.get('host', '')}"}
        if self._public_url:
            own.add("{0.scheme}://{0.netloc}".format(urlsplit(self._public_url)))
        allowed = self._allowed
        return "*" in allowed or origin in allowed or origin in own


def host_of(netloc: str) -> str:
    """The host of `host:port`, in lower case; an IPv6 address keeps its brackets.

    Empty if the text is not a host and a port (`127.0.0.1:80@elsewhere`), because it becomes part of image URLs.
    """
    match = NETLOC.fullmatch(netloc)
    return match[1].lower() if match else ""


def socket_address(scope: Scope) -> str:
    """The server's end of the connection as `host:port`, which no client can forge."""
    host, port = scope["server"]
    try:
        bracketed = f"[{host}]" if ip_address(host).version == 6 else host
    except ValueError:
        bracketed = host
    return f"{bracketed}:{port}"
