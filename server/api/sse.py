"""Server-sent events: what a run has to say, in the words of docs/streaming.md.

A stream is written as fast as its reader takes it, and no faster: the run goes on, its channel drops the oldest, and
nothing piles up here.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipelines.errors import Cancelled, PipelineError
from pipelines.job import Event, Preview, Progress
from server.errors import ServerError, envelope
from server.images.encoding import encode
from server.jobs.generation import Generation
from server.jobs.spec import JobSpec
from server.schema import Body, GenerationReply

SILENCE = 15.0  # seconds after which a comment shows that the connection lives; proxies give up after 30 or 60
PREVIEW_QUALITY = 85
Result = TypeVar("Result")
log = structlog.get_logger("srpo")


def accepts_events(accept: str | None) -> bool:
    """Whether a client reads events it may not know. OpenAI's SDKs, which would hand them on, accept only JSON."""
    return accept is None or any(kind in accept for kind in ("text/event-stream", "text/*", "*/*"))


def event(data: Mapping[str, Any], identity: str | None = None, name: str | None = None) -> bytes:
    """One event on the wire, called by its type."""
    line = f"id: {identity}\n" if identity else ""
    return f"event: {name or data['type']}\n{line}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def progress(now: Progress, spec: JobSpec) -> dict[str, Any]:
    """The data of a progress event."""
    return {
        "type": f"{spec.translated.events}.progress",
        "stage": now.stage,
        "image_index": now.image,
        "num_images": spec.body.num_images,
        "step": now.step,
        "steps": now.steps,
        "queue_position": now.position,
        "eta_seconds": round(now.eta, 1),
    }


def openai_fields(body: Body, width: int, height: int, created: int) -> dict[str, Any]:
    """What OpenAI's events always have."""
    return {
        "size": f"{width}x{height}",
        "created_at": created,
        "output_format": body.output_format,
        "background": "opaque",
        "quality": "auto",
    }


async def partial_image(preview: Preview, generation: Generation) -> dict[str, Any]:
    size = (preview.width, preview.height)
    image = await asyncio.to_thread(encode, preview.pixels, *size, generation.body.output_format, PREVIEW_QUALITY)
    return {
        "type": f"{generation.translated.events}.partial_image",
        "b64_json": image.base64(),
        "partial_image_index": preview.index,
        "image_index": preview.image,
        "width": preview.width,
        "height": preview.height,
        **openai_fields(generation.body, generation.request.width, generation.request.height, int(time.time())),
    }


def completed(index: int, reply: Mapping[str, Any], spec: JobSpec, item: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a finished image: its `item`, and what the reply (as JSON) says of it."""
    used = reply["meta"]["usage"]["tokens_used"]
    return {
        "type": f"{spec.translated.events}.completed",
        **item,
        "image_index": index,
        "num_images": spec.body.num_images,
        "seed": reply["seed"] + index,
        "has_nsfw_concepts": reply["has_nsfw_concepts"][index],
        **{name: reply[name] for name in ("prompt", "timings", "safety", "meta")},
        "usage": {
            "total_tokens": used,
            "input_tokens": 0,
            "output_tokens": used,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        },
        **openai_fields(spec.body, item["width"], item["height"], reply["created"]),
    }


def finished(index: int, reply: GenerationReply, generation: Generation) -> bytes:
    """A finished image on the wire, always with its bytes: OpenAI's SDKs count on them."""
    item = {"b64_json": generation.images[index].base64(), **reply.images[index].model_dump(exclude_none=True)}
    if generation.body.sync_mode:
        item.pop("url", None)  # the same bytes a second time
    told = reply.model_dump(exclude_none=True, exclude={"images", "data"})
    return event(completed(index, told, generation.spec, item))


async def running(news: Event, generation: Generation, *, named: bool, identity: str | None = None) -> bytes:
    """One event of a run on its way. Progress is a comment where it is not wanted as an event (`named`)."""
    if isinstance(news, Preview):
        return event(await partial_image(news, generation), identity)
    data = progress(news, generation.spec)
    return event(data, identity) if named else f": progress {json.dumps(data)}\n\n".encode()


async def narrate(generation: Generation, named: bool, request_id: str, path: str) -> AsyncIterator[bytes]:
    """The whole stream of a run: its events, then its images or the error it ended with."""
    replying = asyncio.ensure_future(generation.reply())
    replying.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # looked at, whoever reads
    try:
        async for _, news in generation.channel.read():
            yield await running(news, generation, named=named)
        reply = await replying
        for index in range(len(reply.images)):
            yield await asyncio.to_thread(finished, index, reply, generation)
    except (PipelineError, ServerError) as error:
        log.warning("stream", request_id=request_id, error=type(error).__name__)
        yield event(envelope(error, request_id, path), name="error")
    except Exception as error:  # the reply has begun: this is its edge
        log.error("stream", request_id=request_id, error=type(error).__name__, exc_info=error)
        yield event(envelope(error, request_id, path), name="error")
    finally:
        generation.cancel()  # nothing to do for a run that has ended
        replying.cancel()


async def client_gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Awaitable[Result], receive: Receive) -> Result:
    """What `work` gives. When the client goes away first, it is dropped. Raises `Cancelled` then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_gone(receive))
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

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str], close: Callable[[], None]) -> None:
        super().__init__(None, 200, {**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        pouring, leaving = asyncio.ensure_future(self._pour(send)), asyncio.ensure_future(client_gone(receive))
        try:
            await asyncio.wait((pouring, leaving), return_when=asyncio.FIRST_COMPLETED)
            if pouring.done():
                pouring.result()
        finally:
            self._close()
            leaving.cancel()
            pouring.cancel()
            await asyncio.gather(pouring, leaving, return_exceptions=True)

    async def _pour(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        coming: asyncio.Future[bytes] = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait((coming,), timeout=SILENCE)
                if not done:
                    await send({"type": "http.response.body", "body": b": still here\n\n", "more_body": True})
                    continue
                await send({"type": "http.response.body", "body": coming.result(), "more_body": True})
                coming = asyncio.ensure_future(anext(self._events))
        except StopAsyncIteration:
            await send({"type": "http.response.body", "body": b""})
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await self._events.aclose()  # type: ignore[attr-defined] # every iterator we are given is a generator
