"""Server-sent events as bytes on a connection (https://html.spec.whatwg.org/multipage/server-sent-events.html).

A stream is written as fast as its reader takes it, and no faster: the work goes on, its channel drops the oldest
events, and nothing piles up here.

`EventStream` is our own because sse-starlette (3.7) does not fit: at the first signal it ends every stream at once,
where ours may finish within `shutdown_grace`; it replaces `uvicorn.Server.handle_exit` for the whole process and its
switch for that is global; it pings at a fixed interval and not after silence; and it writes whole events, with their
prompts and images, to the debug log.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipelines.errors import Cancelled

SILENCE = 15.0  # seconds after which a comment shows that the connection lives; proxies give up after 30 or 60
KEEP_ALIVE = b": still here\n\n"
Result = TypeVar("Result")


# How the SDKs for PHP (by its two HTTP clients) and Rust begin their name: they know OpenAI's events and no others.
STRICT = ("guzzlehttp/", "symfony httpclient", "openai-php", "async-openai")


def accepts_events(accept: str | None) -> bool:
    """Whether a client of this server's own routes reads events: all do but those that accept only JSON."""
    return accept is None or any(kind in accept for kind in ("text/event-stream", "text/*", "*/*"))


def knows_progress(headers: Mapping[str, str]) -> bool:
    """Whether a client of OpenAI's routes reads events that OpenAI does not send.

    OpenAI's SDKs hand every event to their caller, and name themselves. Others' SDKs for PHP and Rust fail at an event
    that they do not know; they accept anything, and go by the name of what carries them, or none.
    """
    accept, agent = headers.get("accept"), headers.get("user-agent", "").lower()
    if "x-stainless-lang" in headers or not accepts_events(accept):
        return False
    return accept is None or "text/event-stream" in accept or not (agent == "" or agent.startswith(STRICT))


def format_event(data: Mapping[str, Any], identity: str | None = None, name: str | None = None) -> bytes:
    """One event; its name is the `type` of its data unless another one is given."""
    line = f"id: {identity}\n" if identity else ""
    return f"event: {name or data['type']}\n{line}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel_on_disconnect(work: Awaitable[Result], receive: Receive) -> Result:
    """The result of `work`. If the client goes away first, `work` is cancelled, and this raises `Cancelled`."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """A reply of events. It ends when they end or when the client goes away; `close` is called in both cases."""

    def __init__(
        self, events: AsyncGenerator[bytes], headers: Mapping[str, str], close: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(None, 200, {**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        sending, leaving = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._close()
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        coming: asyncio.Future[bytes] = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait((coming,), timeout=SILENCE)
                if not done:
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    continue
                await send({"type": "http.response.body", "body": coming.result(), "more_body": True})
                coming = asyncio.ensure_future(anext(self._events))
        except StopAsyncIteration:
            await send({"type": "http.response.body", "body": b""})
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await self._events.aclose()
