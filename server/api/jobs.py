"""Jobs on the wire: looked at, watched, cancelled, listed. The words are docs/streaming.md's."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response

from server.api.dependencies import JobsDep, Owner
from server.api.events import EventPosition, describe_progress, stream_job
from server.api.openapi import JOB, JOB_EVENTS, JOB_PAGE
from server.api.query import QueryChoice, QueryInteger
from server.errors import NotFound
from server.jobs.models import ACCEPTED, CANCELLED, FAILED, SUCCEEDED, JobRecord, WebhookDelivery
from server.jobs.remote import progress_of
from server.jobs.runner import ActiveJob
from server.jobs.service import JobService
from server.jobs.spec import EventForm
from server.jobs.webhooks import format_secret
from server.state import AppState, State
from server.transport.sse import EventStream, accepts_events

MAX_PAGE = 100  # jobs
STATES = {"queued": ACCEPTED, "running": ACCEPTED, "succeeded": SUCCEEDED, "failed": FAILED, "cancelled": CANCELLED}
router = APIRouter()

Limit = Annotated[int, QueryInteger(1, MAX_PAGE), Query(description="Jobs a page.")]
After = Annotated[str | None, Query(description="The `next_cursor` of the page before.")]
Status = Annotated[str | None, QueryChoice(tuple(STATES)), Query(description="Only these.")]
LastEventID = Annotated[str, Header(alias="Last-Event-ID", description="Go on after the event with this `id`.")]


@router.get("/v1/jobs", **JOB_PAGE)
async def list_jobs(
    request: Request,
    state: State,
    jobs: JobsDep,
    owner: Owner,
    limit: Limit = 20,
    after: After = None,
    status: Status = None,
) -> Response:
    """This key's jobs, newest first."""
    states = (STATES[status],) if status else tuple(dict.fromkeys(STATES.values()))
    records = await jobs.page(owner, limit + 1, after, states)
    shown = records[:limit]
    described = [describe_job(request, state, record, jobs.active(record.id)) for record in shown]
    data = [job for job in described if status is None or job["status"] == status]
    more = len(records) > len(shown)
    cursor = {"next_cursor": shown[-1].id} if more else {}
    return JSONResponse({"object": "list", "data": data, "has_more": more, **cursor})


@router.get("/v1/jobs/{identity}", **JOB)
async def get_job(request: Request, state: State, jobs: JobsDep, owner: Owner, identity: str) -> Response:
    """One job; with its reply when it has one."""
    return await reply_with_job(request, state, jobs, *await jobs.find(identity, owner))


@router.delete("/v1/jobs/{identity}", **JOB)
async def cancel_job(request: Request, state: State, jobs: JobsDep, owner: Owner, identity: str) -> Response:
    """Cancel a job within a step. Idempotent: one that has ended stays as it is."""
    return await reply_with_job(request, state, jobs, await jobs.cancel(identity, owner), None)


@router.get("/v1/webhooks/secret", include_in_schema=False)
async def show_webhook_secret(jobs: JobsDep, owner: Owner) -> Response:
    """What this key's webhooks are signed with, as Standard Webhooks' libraries take it."""
    if not jobs.webhooks.enabled:
        raise NotFound("Webhooks are off on this server. Its operator allows hosts by SRPO_WEBHOOK_HOSTS.")
    secrets = await jobs.webhooks.secrets(owner)
    return JSONResponse({"secret": format_secret(secrets[0])}, headers={"cache-control": "no-store"})


@router.get("/v1/jobs/{identity}/events", **JOB_EVENTS)
async def watch_job(
    request: Request, jobs: JobsDep, owner: Owner, identity: str, last_event_id: LastEventID = ""
) -> Response:
    """What happens to a job, as server-sent events. The stream ends with the job; a reader that leaves ends nothing."""
    record, active = await jobs.find(identity, owner)
    after = EventPosition.parse(last_event_id, jobs.epoch)
    named = accepts_events(request.headers.get("accept"))
    return EventStream(stream_job(jobs, record, active, after, named=named, store=None), {})


def poll_url(request: Request, state: AppState, record: JobRecord) -> str:
    return f"{state.origins.base_url(request.scope, request.headers)}/v1/jobs/{record.id}"


async def reply_with_job(
    request: Request,
    state: AppState,
    jobs: JobService,
    record: JobRecord,
    active: ActiveJob | None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A job with its reply or its error, when it has ended. Raises `Gone` if they hold images that have expired."""
    job = describe_job(request, state, record, active)
    if record.state == ACCEPTED:
        return JSONResponse(job, status, headers)
    name, outcome = "reply" if record.state == SUCCEEDED else "error", await jobs.read_outcome(record)
    content = await state.threads.run("encoding", lambda: f'{json.dumps(job)[:-1]}, "{name}": {outcome}}}'.encode())
    return Response(content, status, headers, "application/json")  # the outcome, of up to 100 MB, is JSON as it is


def describe_job(request: Request, state: AppState, record: JobRecord, active: ActiveJob | None) -> dict[str, Any]:
    """A job as clients see it (`JobReply`), without its reply or error."""
    poll = poll_url(request, state, record)
    job: dict[str, Any] = {
        "id": record.id,
        "object": "job",
        "status": job_status(record, active),
        "created_at": int(record.created),
        "model": record.fields.get("model"),
        "poll_url": poll,
        "events_url": f"{poll}/events",
    }
    if record.webhook is not None:
        job["webhook"] = describe_webhook(record.webhook)
    if record.finished is not None:
        job["finished_at"] = int(record.finished)
    if record.state == ACCEPTED:
        generation = active.admitted if active else None
        now = generation.channel.latest() if generation else progress_of(record)
        job["queue_position"] = now.position if now else 0
        job["eta_seconds"] = round(now.eta if now else state.pool.estimate_wait(), 1)
        if now and record.request:
            form = generation.spec.form if generation else EventForm.from_json(record.request)
            job["progress"] = describe_progress(now, form)
    return job


def describe_webhook(delivery: WebhookDelivery) -> dict[str, Any]:
    """As clients see it (`WebhookReply`), without the address."""
    shown: dict[str, Any] = {"status": delivery.state, "attempts": delivery.attempts}
    if delivery.status is not None:
        shown["last_status"] = delivery.status
    if delivery.due is not None:
        shown["next_attempt_at"] = int(delivery.due)
    if delivery.delivered is not None:
        shown["delivered_at"] = int(delivery.delivered)
    return shown


def job_status(record: JobRecord, active: ActiveJob | None) -> str:
    """The state on the wire, where an unfinished job is either queued or running."""
    if record.state != ACCEPTED:
        return record.state
    if active is None:
        now = progress_of(record)
        return "running" if now and now.stage != "queued" else "queued"
    return "running" if active.admitted and active.admitted.job.dispatched else "queued"
