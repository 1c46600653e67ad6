"""Jobs on the wire: accepted, looked at, watched, cancelled, listed. The words are docs/streaming.md's."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from pipelines.errors import PipelineError
from server.api.openapi import JOB, JOB_EVENTS, JOB_PAGE, MAX_PAGE
from server.api.sse import EventStream, accepts_events, completed, event, progress, running, unless_gone
from server.errors import ServerError, envelope, invalid_request
from server.images.store import LocalStore
from server.jobs.generation import start_headers
from server.jobs.models import ACCEPTED, CANCELLED, FAILED, SUCCEEDED, JobRecord
from server.jobs.runner import ActiveJob
from server.jobs.service import JobService
from server.jobs.spec import JobSpec
from server.state import get_app_state

STATES = {"queued": ACCEPTED, "running": ACCEPTED, "succeeded": SUCCEEDED, "failed": FAILED, "cancelled": CANCELLED}
router = APIRouter()


class EventPosition(NamedTuple):
    """A place in a job's stream: its generation's events come first, then its images. Later places are greater."""

    images: int = 0  # that are complete
    number: int = 0  # of the generation's event; 0 once images are complete

    def text(self, epoch: str) -> str:
        """As an event's `id`. `epoch` names the server process that gave the event its number."""
        return f"{epoch}-{self.images}-{self.number}"

    @classmethod
    def parse(cls, text: str, epoch: str) -> Self:
        """The place that a `Last-Event-ID` names; the beginning, if the id is of another process."""
        match = re.fullmatch(r"([0-9a-f]+)-([0-9]{1,9})-([0-9]{1,9})", text)
        return cls(int(match[2]), int(match[3])) if match and match[1] == epoch else cls()


def jobs_of(request: Request) -> JobService:
    jobs: JobService = request.app.state.jobs
    return jobs


def wants_job(request: Request) -> bool:
    """`Prefer: respond-async` (RFC 7240), alone or among others."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in preferences)


def idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise invalid_request(
            "expected 1 to 255 printable ASCII characters",
            path=("idempotency-key",),
            code="invalid_idempotency_key",
            expected="1 to 255 printable ASCII characters",
            received=f"{len(key)} characters",
        )
    return key


def hash_of(fields: dict[str, Any]) -> str:
    """The same for bodies that say the same, whatever their spacing and order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


async def durable(request: Request, spec: JobSpec, owner: str, fields: dict[str, Any]) -> Response:
    """Accept a request as a job, or find the one with its key; answer at once, as it goes, or when it is over."""
    jobs, server = jobs_of(request), get_app_state(request)
    key = idempotency_key(request)
    accepting = jobs.accept(spec, owner, key, hash_of(fields))
    # Who leaves without a key could never ask for the job.
    record, known = await (accepting if key is not None else unless_gone(accepting, request.receive))
    replayed = {"idempotent-replayed": "true"} if known else {}
    if wants_job(request):
        body = describe(request, record, jobs.active(record.id))
        headers = {"location": body["poll_url"], "preference-applied": "respond-async"}
        return JSONResponse(body, 202, headers | replayed)
    if spec.translated.stream:
        headers = {
            **(record.headers or start_headers(spec.translated, server)),
            **replayed,
            "content-location": f"{poll_url(request, record)}/events",
        }
        return event_stream(request, record, jobs.active(record.id), store=server.store, headers=headers)
    ended = await jobs.wait_ended(record)
    return Response(ended.outcome, ended.status or 500, {**(ended.headers or {}), **replayed}, "application/json")


def poll_url(request: Request, record: JobRecord) -> str:
    return f"{get_app_state(request).origins.base_url(request.scope, request.headers)}/v1/jobs/{record.id}"


def describe(request: Request, record: JobRecord, live: ActiveJob | None, *, whole: bool = True) -> dict[str, Any]:
    """A job as clients see it; `whole` with its reply or error."""
    server = get_app_state(request)
    poll = poll_url(request, record)
    native = (record.request or {"spoken": {"native": {}}})["spoken"]["native"]
    generation = live.admitted if live else None
    status = (
        record.state
        if record.state != ACCEPTED
        else "running"
        if generation and generation.job.dispatched
        else "queued"
    )
    job: dict[str, Any] = {
        "id": record.id,
        "object": "job",
        "status": status,
        "created_at": int(record.created),
        "model": native.get("model"),
        "poll_url": poll,
        "events_url": f"{poll}/events",
    }
    if record.finished is not None:
        job["finished_at"] = int(record.finished)
    if record.state == ACCEPTED:
        now = generation.channel.latest() if generation else None
        job["queue_position"] = now.position if now else 0
        job["eta_seconds"] = round(now.eta if now else server.pool.estimate_wait(), 1)
        if generation and now:
            job["progress"] = progress(now, generation.spec)
    elif whole and record.outcome:
        job["reply" if record.state == SUCCEEDED else "error"] = json.loads(record.outcome)
    return job


@router.get("/v1/jobs", **JOB_PAGE)
async def list_jobs(request: Request) -> Response:
    """This key's jobs, newest first."""
    owner = get_app_state(request).keys.authenticate(request.headers.get("authorization"))
    query = request.query_params
    limit, status = query.get("limit", "20"), query.get("status")
    if not (limit.isascii() and limit.isdecimal()) or not 1 <= int(limit[:9]) <= MAX_PAGE:
        raise wrong_query("limit", f"an integer from 1 to {MAX_PAGE}", limit)
    if status is not None and status not in STATES:
        raise wrong_query("status", f"one of {', '.join(STATES)}", status)
    jobs = jobs_of(request)
    states = (STATES[status],) if status else tuple(dict.fromkeys(STATES.values()))
    records = await jobs.page(owner, int(limit) + 1, query.get("after"), states)
    shown = records[: int(limit)]
    described = [describe(request, record, jobs.active(record.id), whole=False) for record in shown]
    data = [job for job in described if status is None or job["status"] == status]
    more = len(records) > len(shown)
    cursor = {"next_cursor": shown[-1].id} if more else {}
    return JSONResponse({"object": "list", "data": data, "has_more": more, **cursor})


def wrong_query(name: str, expected: str, received: str) -> Exception:
    shown = ascii(received)[:80]
    return invalid_request(
        f"expected {expected}, received {shown}",
        path=(name,),
        code="invalid_query",
        expected=expected,
        received=shown,
    )


@router.get("/v1/jobs/{identity}", **JOB)
async def get_job(request: Request, identity: str) -> Response:
    """One job; with its reply when it has one."""
    owner = get_app_state(request).keys.authenticate(request.headers.get("authorization"))
    return JSONResponse(describe(request, *await jobs_of(request).find(identity, owner)))


@router.delete("/v1/jobs/{identity}", **JOB)
async def cancel_job(request: Request, identity: str) -> Response:
    """Cancel a job within a step. Idempotent: one that has ended stays as it is."""
    owner = get_app_state(request).keys.authenticate(request.headers.get("authorization"))
    return JSONResponse(describe(request, await jobs_of(request).cancel(identity, owner), None))


@router.get("/v1/jobs/{identity}/events", **JOB_EVENTS)
async def watch_job(request: Request, identity: str) -> Response:
    """What happens to a job, as server-sent events; after `Last-Event-ID` where that is given."""
    owner = get_app_state(request).keys.authenticate(request.headers.get("authorization"))
    jobs = jobs_of(request)
    record, live = await jobs.find(identity, owner)
    return event_stream(
        request, record, live, EventPosition.parse(request.headers.get("last-event-id", ""), jobs.epoch)
    )


def event_stream(
    request: Request,
    record: JobRecord,
    live: ActiveJob | None,
    after: EventPosition = EventPosition(),  # noqa: B008 - frozen
    store: LocalStore | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> EventStream:
    """A job's events. They end when it ends or the reader leaves; the job goes on."""
    named = accepts_events(request.headers.get("accept"))
    events = tell(jobs_of(request), record, live, after, get_app_state(request).served, named=named, store=store)
    return EventStream(events, headers, lambda: None)


async def tell(
    jobs: JobService,
    record: JobRecord,
    live: ActiveJob | None,
    after: EventPosition,
    served: str,
    *,
    named: bool,
    store: LocalStore | None,
) -> AsyncIterator[bytes]:
    """A job's events: its run's while it runs, then its images or its error.

    With a `store` each image comes with its bytes, as in a stream without a job.
    """
    try:
        if live and not after.images and (generation := await asyncio.shield(live.generation)):
            async for number, news in generation.channel.read(after.number):
                yield await running(news, generation, named=named, identity=EventPosition(0, number).text(jobs.epoch))
        ended = await jobs.wait_ended(record)
        outcome = json.loads(ended.outcome or "{}")
        if ended.state != SUCCEEDED:
            yield event(outcome, name="error")
            return
        assert ended.request is not None
        spec = JobSpec.from_json(ended.request, served)
        for index, item in enumerate(outcome["images"]):
            if index >= after.images:
                shown = await asyncio.to_thread(with_bytes, item, store) if store else item
                yield event(completed(index, outcome, spec, shown), EventPosition(index + 1).text(jobs.epoch))
    except (PipelineError, ServerError) as error:
        yield event(envelope(error, record.id, f"/v1/jobs/{record.id}"), name="error")


def with_bytes(item: dict[str, Any], store: LocalStore) -> dict[str, Any]:
    """A reply's item with its file in it, from wherever its URL leads. Raises `Gone`."""
    if "b64_json" in item:
        return item
    url = item["url"]
    if url.startswith("data:"):
        rest = {name: value for name, value in item.items() if name != "url"}
        return {"b64_json": url.partition(",")[2], **rest}
    path, _, _ = store.find(url.rpartition("/")[2])
    return {"b64_json": base64.b64encode(path.read_bytes()).decode("ascii"), **item}
