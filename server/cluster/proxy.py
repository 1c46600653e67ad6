"""What Ray Serve's own HTTP proxy does before it looks at a request, and with what it answers itself.

Serve obeys headers from anybody: how long a request may take, whether its work goes on without its client, which
replica gets it. Those are not for clients. While no `Api` replica has ever been there, Serve answers 404 in plain text,
which clients take for the answer about a job or an image. The variable `CALLBACK` makes the proxy call
`list_middlewares`.
"""

import secrets

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.errors import NotReady
from server.envelope import envelope, headers_of
from server.error_table import row_of

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "server.cluster.proxy.list_middlewares"}
START = 10.0  # seconds after which a client may try again
STRIPPED = (
    b"x_request_timeout_seconds",
    b"x_request_disconnect_disabled",
    b"serve_multiplexed_model_id",
    b"x_session_id",
    b"x_request_id",  # ours is made by the app
)


class HeaderFilter:
    """ASGI middleware: the headers in `STRIPPED`, with hyphens or underscores, do not get any further.

    Of a reply's request ids the first one stays, the app's: Serve adds its own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            headers = [item for item in scope["headers"] if item[0].lower().replace(b"-", b"_") not in STRIPPED]
            scope = {**scope, "headers": headers}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                second = [index for index, (name, _) in enumerate(headers) if name.lower() == b"x-request-id"][1:]
                message["headers"] = [item for index, item in enumerate(headers) if index not in second]
            await send(message)

        await self._app(scope, receive, answer)


class StartAnswer:
    """ASGI middleware: Serve's own 404, which is text where the app's is JSON, becomes the app's 503 `not_ready`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 404:
                replaced = Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain")
                if replaced:
                    error, request_id = NotReady("starting the cluster", 0.0, START), secrets.token_hex(16)
                    body = envelope(error, request_id, scope["path"])
                    headers = headers_of(error) | {"x-request-id": request_id}
                    await JSONResponse(body, row_of(error).status, headers)(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, answer)


def list_middlewares() -> list[Middleware]:
    return [Middleware(HeaderFilter), Middleware(StartAnswer)]
