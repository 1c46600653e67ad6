"""Each endpoint, a few lines."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from pipelines.errors import PromptRefused, SafetyUnavailable
from pipelines.job import Job
from pipelines.pool import WorkerPool
from pipelines.prompts import PromptGuard
from pipelines.request import ImageResult
from pipelines.safety import Guard, InspectedResult
from server.auth import KeyRing
from server.body import read_object, wrong
from server.encoding import EncodedImage, encode_one
from server.errors import NotFound
from server.files import file_response
from server.openapi import GENERATION, MODELS
from server.origin import Origins
from server.schema import GenerationBody, GenerationReply, ImageItem
from server.settings import Settings
from server.spellings import Spoken, header_of, translate
from server.store import LocalStore
from weights.checkpoints import CHECKPOINTS, SERVED_AS

log = structlog.get_logger("srpo")
router = APIRouter()


@dataclass(frozen=True, slots=True)
class Server:
    """What the routes work with."""

    settings: Settings
    pool: WorkerPool
    store: LocalStore
    keys: KeyRing
    guard: Guard
    prompts: PromptGuard
    origins: Origins
    served: str  # id of the row in weights.checkpoints that the workers load


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


@router.post("/v1/images/generations", status_code=201, **GENERATION)
@router.post("/v1/images/generations/", include_in_schema=False)
@router.post("/images/generations", include_in_schema=False)
@router.post("/images/generations/", include_in_schema=False)
async def generate_images(request: Request) -> Response:
    """Generate images from a prompt."""
    server = server_of(request)
    server.keys.check(request.headers.get("authorization"))
    spoken = translate(await read_object(request, server.settings.max_body, server.settings.body_timeout))
    refuse_stream(spoken)
    body = GenerationBody.read(spoken.native, server.served)
    if server.settings.log_prompts:
        log.info("prompt", request_id=request.scope["state"]["request_id"], prompt=body.prompt)
    await admit(body.prompt, server)
    job = server.pool.submit(body.to_request(server.served))
    result = await outcome(job, request, server.pool)
    watch = Stopwatch()
    inspected = await inspect(result, body.enable_safety_checker, spoken, server)
    watch.lap("safety")
    encoded = await encode_all(inspected, body.output_format, server.settings)
    items = await deliver(encoded, body, spoken, request)
    watch.lap("encode")
    reply = GenerationReply.from_result(inspected, items, watch.seconds, server.settings)
    return await respond(reply, spoken, server)


def refuse_stream(spoken: Spoken) -> None:
    if spoken.stream:
        raise wrong(
            "streaming is not served yet; leave stream out or send false",
            path=("stream",),
            code="unsupported",
            expected="false",
            received="true",
        )


async def outcome(job: Job, request: Request, pool: WorkerPool) -> ImageResult:
    """The job's result. When the client goes away first, its job is cancelled."""
    result = asyncio.ensure_future(job.result())
    gone = asyncio.ensure_future(client_gone(request))
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            pool.cancel(job)
        return await result
    finally:
        gone.cancel()
        pool.cancel(job)  # nothing to do for a job that has ended


async def client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def admit(prompt: str, server: Server) -> None:
    """Refuse what the operator refuses, before any work. Checks that fail or hang are a 503."""
    try:
        async with closed_after(server.settings.safety_timeout):
            await asyncio.to_thread(server.prompts.check, prompt)
    except PromptRefused as error:
        log.info("prompt_refused", reason=error.reason)
        raise


async def inspect(result: ImageResult, wanted: bool, spoken: Spoken, server: Server) -> InspectedResult:
    """The result with flagged images withheld. A checker that fails or hangs is a 503, never an unchecked image."""
    if server.guard.overrules(wanted):
        spoken.ignored.append("enable_safety_checker")
    async with closed_after(server.settings.safety_timeout):
        return await asyncio.to_thread(server.guard.inspect, result, wanted)


@asynccontextmanager
async def closed_after(seconds: float) -> AsyncIterator[None]:
    """A check that fails, or gives no verdict in time, is `SafetyUnavailable`, with its cause in the log."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        log.error("safety", cause=f"no verdict within {seconds:g} s")
        raise SafetyUnavailable("timeout") from None
    except SafetyUnavailable as error:
        log.error("safety", cause=error.cause)
        raise


class Stopwatch:
    """Seconds of one stage after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._last = now - self._last, now


async def encode_all(inspected: InspectedResult, format: str, settings: Settings) -> list[EncodedImage]:
    """Encode every image, each in a thread."""
    tasks = (
        asyncio.to_thread(encode_one, inspected, index, format, settings)
        for index in range(len(inspected.result.pixels))
    )
    return list(await asyncio.gather(*tasks))


async def deliver(
    images: list[EncodedImage], body: GenerationBody, spoken: Spoken, request: Request
) -> list[ImageItem]:
    """Each image as the client asked for it: bare base64, a data URI, or a URL of the stored file."""
    server = server_of(request)
    base_url = server.origins.base_url(request.scope, request.headers)

    def item(image: EncodedImage) -> ImageItem:
        if spoken.response_format == "b64_json":
            place = {"b64_json": image.base64()}
        elif body.sync_mode:
            place = {"url": image.data_uri()}
        else:
            place = {"url": server.store.put(image, base_url).url}
        return ImageItem(width=image.width, height=image.height, content_type=image.content_type, **place)

    return list(await asyncio.gather(*(asyncio.to_thread(item, image) for image in images)))


async def respond(reply: GenerationReply, spoken: Spoken, server: Server) -> Response:
    headers = {
        "x-aimlapi-credits-used": str(reply.meta.usage.credits_used),
        "x-aimlapi-usd-spent": f"{reply.meta.usage.usd_spent:.8f}".rstrip("0").rstrip("."),
    }
    if info := server.pool.status().info:
        headers["x-engine-fingerprint"] = info.fingerprint
    if spoken.ignored:
        headers["x-ignored-fields"] = header_of(spoken.ignored)
    content = await asyncio.to_thread(lambda: reply.model_dump_json(exclude_none=True))
    return Response(content, server.settings.success_status, headers, "application/json")


@router.get("/v1/models", **MODELS)
@router.get("/models", include_in_schema=False)
async def list_models(request: Request) -> JSONResponse:
    """The models this server answers to."""
    served = server_of(request).served
    return JSONResponse({"object": "list", "data": [model_card(name, served) for name in model_ids(served)]})


@router.get("/v1/models/{model:path}", responses=MODELS["responses"])
@router.get("/models/{model:path}", include_in_schema=False)
async def get_model(request: Request, model: str) -> JSONResponse:
    """One model."""
    served = server_of(request).served
    if model not in model_ids(served):
        raise NotFound("There is no such model here.")
    return JSONResponse(model_card(model, served))


def model_ids(served: str) -> list[str]:
    return list(dict.fromkeys((SERVED_AS, served)))


def model_card(name: str, served: str) -> dict[str, Any]:
    row = CHECKPOINTS[served]
    return {
        "id": name,
        "object": "model",
        "type": "image",
        "created": 0,
        "owned_by": "self-hosted",
        "info": {"name": name, "served_by": served, "description": row.title, "licence": row.licence},
    }


@router.api_route("/files/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def get_file(request: Request, name: str) -> Response:
    """A stored image. No key: the name is the secret."""
    path, content_type, left = server_of(request).store.find(name)
    return await asyncio.to_thread(file_response, path, content_type, left, request)


@router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def health(request: Request) -> JSONResponse:
    """Alive, and what is being served. Always 200 while this process answers."""
    server = server_of(request)
    status = asdict(server.pool.status())
    info = status.pop("info") or {}
    placeholder = CHECKPOINTS[server.served].embedded
    safety = server.guard.description | {"prompts": server.prompts.description}
    return JSONResponse(
        {"status": "ok", "served_model": server.served, "embedded": placeholder, "safety": safety} | status | info
    )


@router.api_route("/ready", methods=["GET", "HEAD"], include_in_schema=False)
async def ready(request: Request) -> JSONResponse:
    """200 when a request would be drawn now; else 503 with the stage of loading."""
    status = server_of(request).pool.status()
    body = {
        "ready": status.state == "ready",
        "state": status.state,
        "stage": status.stage,
        "progress": round(status.progress, 3),
        "eta_seconds": round(status.eta, 1),
    }
    if status.state == "ready":
        return JSONResponse(body)
    return JSONResponse(body, 503, {"retry-after": str(max(1, round(status.eta)))})
