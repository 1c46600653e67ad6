"""Images: a body becomes a request, and the request a generation or a durable job."""

import hashlib
import io
import json
from contextlib import closing
from typing import Any, BinaryIO

import structlog
from fastapi import APIRouter, Request
from starlette.responses import Response

from pipelines.request import ImageRequest
from pipelines.trace_context import trace_context
from server.api.dependencies import Drawer, JobsDep
from server.api.edits import read_edit
from server.api.openapi import EDITS, GENERATION
from server.api.replies import Call, accepted_reply, ended_reply, finished_reply, generation_stream, job_stream
from server.errors import invalid_request
from server.jobs.generation import Generation, check_prompt
from server.jobs.joining import TRIES, RequestIdentity
from server.jobs.spec import JobSpec
from server.jobs.webhooks import check_url
from server.schema import read_body
from server.security.limits import UNCOUNTED
from server.state import State
from server.translation.aliases import lift_extra_body, translate
from server.translation.translated_request import EVENTS, TranslatedRequest
from server.transport.json_body import read_object
from server.transport.multipart import sha256_of, too_many_pictures
from server.transport.sse import cancel_on_disconnect

WEBHOOK = "webhook-url"
LATE = 60.0  # seconds: what comes after the work on the device
MAX_KEY = 255  # characters of an Idempotency-Key
log = structlog.get_logger("srpo")
router = APIRouter()


@router.post("/v1/images/generations", status_code=201, **GENERATION)
@router.post("/v1/images/generations/", include_in_schema=False)
@router.post("/images/generations", include_in_schema=False)
@router.post("/images/generations/", include_in_schema=False)
async def generate_images(request: Request, state: State, jobs: JobsDep, caller: Drawer) -> Response:
    """Generate images from a prompt."""
    with state.uploads.open() as upload:
        call = Call(request, state, jobs, caller, upload)
        await check_room(call)
        fields = lift_extra_body(await read_object(request, state, upload))
        webhook = take_webhook(call, fields)
        return await answer(call, fields, translate(fields, state.dialect), webhook=webhook)


@router.post("/v1/images/edits", status_code=201, **EDITS)
@router.post("/v1/images/edits/", include_in_schema=False)
@router.post("/images/edits", include_in_schema=False)
@router.post("/images/edits/", include_in_schema=False)
async def edit_image(request: Request, state: State, jobs: JobsDep, caller: Drawer) -> Response:
    """Begin at a picture: image-to-image as OpenAI's SDKs send `images.edit`, or as JSON."""
    with state.uploads.open() as upload:
        call = Call(request, state, jobs, caller, upload)
        await check_room(call)
        form = await read_edit(request, state, upload)
        fields, picture = form.fields, form.picture
        with closing(picture or io.BytesIO()):
            if form.unused and state.settings.edit_pictures == "one":
                raise too_many_pictures(1 + len(form.unused))
            webhook = take_webhook(call, fields)
            translated = translate(fields, state.dialect, edit=True)
            translated.events = "image_edit"
            translated.ignore(form.unused)
            if picture is not None:
                fields["image"] = await state.threads.run("bodies", sha256_of, picture)
            return await answer(call, fields, translated, picture, webhook)


async def check_room(call: Call) -> None:
    """Count the request, and refuse a large body before it is sent, where there is no room for its request.

    A small one is read first: its own faults are reported before the server's. So is one with an idempotency key,
    whose answer may exist.
    Raises `KeyRateReached`, `NotReady`, `Draining`, `QueueFull` or `KeyLimitReached`.
    """
    await call.state.limits.count_request(call.caller)
    headers = call.request.headers
    if "idempotency-key" not in headers and int(headers.get("content-length", UNCOUNTED + 1)) > UNCOUNTED:
        call.state.limits.check(call.caller)
        call.state.pool.check_capacity()


async def answer(
    call: Call,
    fields: dict[str, Any],
    translated: TranslatedRequest,
    picture: BinaryIO | None = None,
    webhook: tuple[str, str] | None = None,
) -> Response:
    """Carry a request out and reply in the way it asks for.

    `fields` are the request as it came. They may hold a picture of many megabytes, so they are emptied once they are
    hashed. `webhook`: where its end is told, and the host of that; such a request is a job.
    """
    spec = read_spec(call, translated, picture, webhook)
    if wants_job(call.request, spec):
        body_hash = await hash_body(call, fields, spec)
        fields.clear()
        return await answer_with_job(call, spec, body_hash)
    identity = await identify_try(call, fields, spec)
    fields.clear()
    if identity and (shared := call.jobs.joins.find(identity, call.request.headers[TRIES])):
        release_source(call, spec)  # the first try has it
        return await finished_reply(call, shared, {"idempotent-replayed": "true"})
    with call.jobs.joins.starting(identity):
        generation = await start_generation(call, spec)
    if translated.stream:
        return generation_stream(call, generation)
    return await finished_reply(call, call.jobs.joins.open(identity, generation), {})


def take_webhook(call: Call, fields: dict[str, Any]) -> tuple[str, str] | None:
    """Where the job's end is to be told, from the header or else the field, which is taken out of `fields`.

    None where nothing is named, or this server has no webhooks: then the name is one of those that are ignored. Raises
    `InvalidRequest`.
    """
    if not call.jobs.webhooks.enabled:
        return None
    field = fields.pop("webhook_url", None)
    url = call.request.headers.get(WEBHOOK, field)
    return None if url is None else check_url(url, call.state.settings)


def read_spec(
    call: Call, translated: TranslatedRequest, picture: BinaryIO | None, webhook: tuple[str, str] | None
) -> JobSpec:
    """The validated request. Raises `InvalidRequest`."""
    request, state = call.request, call.state
    if WEBHOOK in request.headers and webhook is None:
        translated.ignore([WEBHOOK])
    body = read_body(translated.native, state.served, state.dialect.model_aliases)
    if state.settings.log_prompts:
        log.info("prompt", request_id=request.scope["state"]["request_id"], prompt=body.prompt)
    base_url = state.origins.base_url(request.scope, request.headers)
    return JobSpec(translated, body, base_url, picture, webhook=webhook, trace=trace_context.get())


def release_source(call: Call, spec: JobSpec) -> None:
    """Forget the source picture, and give back what the body took of the budget for uploads."""
    spec.release_source()
    call.upload.close()


async def start_generation(call: Call, spec: JobSpec) -> Generation:
    """Submit a request whose reply is waited for, once its prompt is checked and its source picture read.

    Raises what `check_prompt`, `JobSpec.build_request` and `submit` do.
    """
    await check_prompt(spec.body.prompt, call.state)
    building = spec.build_request(call.state, call.caller)
    request = await (cancel_on_disconnect(building, call.request.receive) if spec.has_source else building)
    release_source(call, spec)
    return await submit(call, spec, request)


async def submit(call: Call, spec: JobSpec, request: ImageRequest) -> Generation:
    """Submit a request within its key's quota.

    Raises what `Generation.start` does, and `QuotaSpent`.
    """
    state, quota = call.state, call.state.limits.images_per_day(call.caller)
    if quota is None:
        return Generation.start(state, spec, request, call.caller)
    state.limits.check(call.caller)  # before anything is written down
    state.pool.check_capacity()
    longest = state.settings.request_timeout + LATE
    reservation = await state.usage.reserve(call.caller.owner, len(request.seeds), quota, longest)
    try:
        return Generation.start(state, spec, request, call.caller, reservation=reservation)
    except BaseException:
        state.usage.release(reservation)
        raise


async def identify_try(call: Call, fields: dict[str, Any], spec: JobSpec) -> RequestIdentity | None:
    """What the tries of one request have in common; None for a request whose retry cannot join it.

    A stream shows at once that it is answered. A job, for which this is not asked, has its own key.
    """
    if TRIES not in call.request.headers or spec.translated.stream:
        return None
    return RequestIdentity(call.caller.owner, await hash_body(call, fields, spec))


async def answer_with_job(call: Call, spec: JobSpec, body_hash: str) -> Response:
    """Accept a request as a job, or find the one with its key; reply at once, by events, or when the job is over."""
    key = idempotency_key(call.request)
    accepting = call.jobs.accept(spec, call.caller, key, body_hash)
    # A client that leaves and has no key could never ask for the job: it is not accepted.
    record, known = await (accepting if key is not None else cancel_on_disconnect(accepting, call.request.receive))
    release_source(call, spec)
    headers = {"idempotent-replayed": "true"} if known else {}
    if prefers_async(call.request):
        return await accepted_reply(call, spec, record, headers)
    if spec.translated.stream:
        return job_stream(call, spec, record, headers)
    return await ended_reply(call, record, headers)


def wants_job(request: Request, spec: JobSpec) -> bool:
    """Whether the request becomes a durable job."""
    return prefers_async(request) or "idempotency-key" in request.headers or spec.webhook is not None


def prefers_async(request: Request) -> bool:
    """`Prefer: respond-async` (RFC 7240), alone or among others."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in preferences)


def idempotency_key(request: Request) -> str | None:
    """The header, if there is one. Raises `InvalidRequest`."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable()):
        expected = f"1 to {MAX_KEY} printable ASCII characters"
        raise invalid_request(
            f"expected {expected}",
            path=("idempotency-key",),
            code="invalid_idempotency_key",
            expected=expected,
            received=f"{len(key)} characters",
        )
    return key


async def hash_body(call: Call, fields: dict[str, Any], spec: JobSpec) -> str:
    """The same for bodies that say the same, whatever their spacing and order; an edit is another request."""
    content = fields if spec.translated.events == EVENTS else [spec.translated.events, fields]
    return await call.state.threads.run("bodies", hash_json, content)


def hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
