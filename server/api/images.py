"""Each endpoint, a few lines."""

import asyncio
import io
from contextlib import closing
from dataclasses import asdict
from typing import Any, BinaryIO

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from server.aliases import TranslatedRequest, translate
from server.api.files import file_response
from server.api.jobs import durable, wants_job
from server.api.json_body import read_object
from server.api.multipart import read_form, sha256_of
from server.api.openapi import EDITS, GENERATION, MODELS
from server.api.sse import EventStream, accepts_events, client_gone, narrate, unless_gone
from server.errors import NotFound
from server.jobs.generation import Generation, check_prompt, reply_headers, start_headers
from server.jobs.spec import JobSpec
from server.schema import GenerationReply, model_ids, read_body
from server.state import AppState, get_app_state
from weights.checkpoints import CHECKPOINTS

log = structlog.get_logger("srpo")
router = APIRouter()


@router.post("/v1/images/generations", status_code=201, **GENERATION)
@router.post("/v1/images/generations/", include_in_schema=False)
@router.post("/images/generations", include_in_schema=False)
@router.post("/images/generations/", include_in_schema=False)
async def generate_images(request: Request) -> Response:
    """Generate images from a prompt."""
    server = get_app_state(request)
    owner = server.keys.authenticate(request.headers.get("authorization"))
    fields = await read_object(request, server.settings.max_body, server.settings.body_timeout)
    return await answer(request, owner, fields, translate(fields, server.served))


@router.post("/v1/images/edits", status_code=201, **EDITS)
@router.post("/v1/images/edits/", include_in_schema=False)
@router.post("/images/edits", include_in_schema=False)
@router.post("/images/edits/", include_in_schema=False)
async def edit_image(request: Request) -> Response:
    """Begin at an uploaded picture: image-to-image as OpenAI's SDKs send `images.edit`."""
    server = get_app_state(request)
    owner = server.keys.authenticate(request.headers.get("authorization"))
    settings = server.settings
    fields, picture = await read_form(request, settings.max_body, settings.max_upload, settings.body_timeout)
    with closing(picture or io.BytesIO()):
        translated = translate(fields, server.served)
        translated.events = "image_edit"
        if picture is not None:
            fields["image"] = await asyncio.to_thread(sha256_of, picture)
        return await answer(request, owner, fields, translated, picture)


async def answer(
    request: Request, owner: str, fields: dict[str, Any], translated: TranslatedRequest, picture: BinaryIO | None = None
) -> Response:
    """Carry a request out, as the client wants to hear of it. `fields` are the request as it came."""
    server = get_app_state(request)
    body = read_body(translated.native, server.served)
    if server.settings.log_prompts:
        log.info("prompt", request_id=request.scope["state"]["request_id"], prompt=body.prompt)
    await check_prompt(body.prompt, server)
    spec = JobSpec(translated, body, server.origins.base_url(request.scope, request.headers), picture)
    if wants_job(request) or "idempotency-key" in request.headers:
        return await durable(request, spec, owner, fields)
    generation = Generation.start(server, spec, await unless_gone(spec.build_request(server), request.receive))
    if translated.stream:
        return stream(generation, request, server)
    return await respond(await attend(generation, request), translated, server)


def stream(generation: Generation, request: Request, server: AppState) -> EventStream:
    named = accepts_events(request.headers.get("accept"))
    events = narrate(generation, named, request.scope["state"]["request_id"], request.scope["path"])
    return EventStream(events, start_headers(generation.translated, server), generation.cancel)


async def attend(generation: Generation, request: Request) -> GenerationReply:
    """The run's reply. When the client goes away first, its work is cancelled."""
    replying = asyncio.ensure_future(generation.reply())
    gone = asyncio.ensure_future(client_gone(request.receive))
    try:
        await asyncio.wait((replying, gone), return_when=asyncio.FIRST_COMPLETED)
        if not replying.done():
            generation.cancel()
        return await replying
    finally:
        gone.cancel()
        generation.cancel()  # nothing to do for a run that has ended


async def respond(reply: GenerationReply, translated: TranslatedRequest, server: AppState) -> Response:
    content = await asyncio.to_thread(reply.text)
    return Response(
        content, server.settings.success_status, reply_headers(reply, translated, server), "application/json"
    )


@router.get("/v1/models", **MODELS)
@router.get("/models", include_in_schema=False)
async def list_models(request: Request) -> JSONResponse:
    """The models this server answers to."""
    served = get_app_state(request).served
    return JSONResponse({"object": "list", "data": [model_card(name, served) for name in model_ids(served)]})


@router.get("/v1/models/{model:path}", **MODELS)
@router.get("/models/{model:path}", include_in_schema=False)
async def get_model(request: Request, model: str) -> JSONResponse:
    """One model."""
    served = get_app_state(request).served
    if model not in model_ids(served):
        raise NotFound("There is no such model here.")
    return JSONResponse(model_card(model, served))


def model_card(name: str, served: str) -> dict[str, Any]:
    row = CHECKPOINTS[served]
    info: dict[str, Any] = {"name": name, "served_by": served, "description": row.title, "licence": row.licence}
    if row.subjects:
        info["knows"] = row.subjects
    return {
        "id": name,
        "object": "model",
        "type": "image",
        "created": 0,
        "owned_by": "self-hosted",
        "info": info,
    }


@router.api_route("/files/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def get_file(request: Request, name: str) -> Response:
    """A stored image. No key: the name is the secret."""
    path, content_type, left = get_app_state(request).store.find(name)
    return await asyncio.to_thread(file_response, path, content_type, left, request)


@router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def health(request: Request) -> JSONResponse:
    """Alive, and what is being served. Always 200 while this process answers."""
    server = get_app_state(request)
    status = asdict(server.pool.status())
    info = status.pop("info") or {}
    if info:
        info["levers"] = info.pop("optimizations")  # the public name
    placeholder = CHECKPOINTS[server.served].embedded
    safety = server.guard.description | {"prompts": server.prompts.description}
    return JSONResponse(
        {"status": "ok", "served_model": server.served, "embedded": placeholder, "safety": safety} | status | info
    )


@router.api_route("/ready", methods=["GET", "HEAD"], include_in_schema=False)
async def ready(request: Request) -> JSONResponse:
    """200 when a request would be drawn now; else 503 with the stage of loading."""
    status = get_app_state(request).pool.status()
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
