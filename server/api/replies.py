"""How a call for images is answered: with finished images, with events, or with the job that it has become."""

import json
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response

from server.api.events import EventPosition, stream_generation, stream_job
from server.api.jobs import poll_url, reply_with_job
from server.envelope import readdress
from server.errors import JobCancelled
from server.jobs.generation import Generation, reply_headers, start_headers
from server.jobs.joining import SharedGeneration
from server.jobs.models import CANCELLED, SUCCEEDED, JobRecord
from server.jobs.service import JobService
from server.jobs.spec import JobSpec
from server.schema import GenerationReply
from server.security.callers import Caller
from server.security.limits import Upload
from server.state import AppState
from server.transport.json_body import AT_ONCE
from server.transport.sse import EventStream, cancel_on_disconnect, knows_progress


@dataclass(frozen=True, slots=True)
class Call:
    """A call of this API, what it is answered with, and what its body takes of the budget for uploads."""

    request: Request
    state: AppState
    jobs: JobService
    caller: Caller
    upload: Upload

    @property
    def address(self) -> tuple[str, str]:
        """What an error's envelope names: the request's id and its path."""
        return self.request.scope["state"]["request_id"], self.request.scope["path"]


async def finished_reply(call: Call, shared: SharedGeneration, headers: dict[str, str]) -> Response:
    """The finished images. Work that the last waiting client leaves ends."""
    shared.join()
    try:
        reply: GenerationReply = await cancel_on_disconnect(shared.reply(), call.request.receive)
    finally:
        shared.leave()
    content = reply.text() if reply.length <= AT_ONCE else await call.state.threads.run("encoding", reply.text)
    headers = reply_headers(reply, shared.generation.translated, call.state) | headers
    return Response(content, call.state.settings.success_status, headers, "application/json")


def generation_stream(call: Call, generation: Generation) -> EventStream:
    """The events of a generation that ends with its reader."""
    named = knows_progress(call.request.headers)
    events = stream_generation(generation, named, *call.address)
    return EventStream(events, start_headers(generation.translated, call.state), generation.cancel)


async def ended_reply(call: Call, record: JobRecord, headers: dict[str, str]) -> Response:
    """What the job's own request is answered with, when the job is over."""
    ended = await call.jobs.wait_ended(record)
    if ended.state == CANCELLED:
        raise JobCancelled
    content = await call.jobs.read_outcome(ended)
    if ended.state != SUCCEEDED:
        content = json.dumps(readdress(json.loads(content), *call.address))
    return Response(content, ended.status or 500, {**(ended.headers or {}), **headers}, "application/json")


async def accepted_reply(call: Call, spec: JobSpec, record: JobRecord, headers: dict[str, str]) -> Response:
    """202, and where the job is; which fields were ignored, since a caller of a webhook may never ask again."""
    headers = (
        headers
        | start_headers(spec.translated, call.state)
        | {
            "location": poll_url(call.request, call.state, record),
            "preference-applied": "respond-async",
        }
    )
    return await reply_with_job(
        call.request, call.state, call.jobs, record, call.jobs.active(record.id), status=202, headers=headers
    )


def job_stream(call: Call, spec: JobSpec, record: JobRecord, headers: dict[str, str]) -> EventStream:
    """The job's events with the images' bytes. The job goes on if the reader leaves."""
    events = stream_job(
        call.jobs,
        record,
        call.jobs.active(record.id),
        EventPosition(),
        named=knows_progress(call.request.headers),
        store=call.state.store,
        address=call.address,
    )
    location = {"content-location": f"{poll_url(call.request, call.state, record)}/events"}
    return EventStream(events, (record.headers or start_headers(spec.translated, call.state)) | headers | location)
