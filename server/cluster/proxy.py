"""What Ray Serve's own HTTP proxy does before it looks at a request.

Serve obeys headers from anybody: how long a request may take, whether its work goes on without its client, which
replica gets it. Those are not for clients. The variable `CALLBACK` makes the proxy call `list_middlewares`.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.cluster.proxy.list_middlewares"}
STRIPPED = (
    b"x_request_timeout_seconds",
    b"x_request_disconnect_disabled",
    b"serve_multiplexed_model_id",
    b"x_session_id",
    b"x_request_id",  # ours is made by the app
)


class HeaderFilter:
    """ASGI middleware: the headers in `STRIPPED`, with hyphens or underscores, do not get any further."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [item for item in scope["headers"] if item[0].lower().replace(b"-", b"_") not in STRIPPED]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def list_middlewares() -> list[Middleware]:
    return [Middleware(HeaderFilter)]
