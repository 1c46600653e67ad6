"""What a stream says, in the words of docs/streaming.md: the events of a generation, and those of a job."""

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple, Self

import structlog

from pipelines.errors import PipelineError
from pipelines.job import Event, Preview, Progress
from server.detailed_reply import TokenUsage
from server.envelope import envelope, readdress
from server.errors import Gone, JobCancelled, ServerError
from server.images.encoding import encode
from server.images.stores.base import Store
from server.jobs.generation import Generation
from server.jobs.models import CANCELLED, SUCCEEDED, JobRecord
from server.jobs.runner import ActiveJob
from server.jobs.service import JobService
from server.jobs.spec import EventForm
from server.schema import GenerationReply
from server.transport.sse import format_event

PREVIEW_QUALITY = 85
log = structlog.get_logger("srpo")


class EventPosition(NamedTuple):
    """A place in a job's stream: its generation's events come first, then its images. Later places are greater."""

    images: int = 0  # that are complete
    number: int = 0  # of the generation's event; 0 once images are complete

    def format_id(self, epoch: str) -> str:
        """As an event's `id`. `epoch` names the server process that gave the event its number."""
        return f"{epoch}-{self.images}-{self.number}"

    @classmethod
    def parse(cls, text: str, epoch: str) -> Self:
        """The place that a `Last-Event-ID` names; the beginning, if the id is of another process."""
        match = re.fullmatch(r"([0-9a-f]+)-([0-9]{1,9})-([0-9]{1,9})", text)
        return cls(int(match[2]), int(match[3])) if match and match[1] == epoch else cls()


def describe_progress(progress: Progress, form: EventForm) -> dict[str, Any]:
    """The data of a progress event."""
    return {
        "type": f"{form.events}.progress",
        "stage": progress.stage,
        "image_index": progress.image,
        "num_images": form.num_images,
        "step": progress.step,
        "steps": progress.steps,
        "queue_position": progress.position,
        "eta_seconds": round(progress.eta, 1),
    }


async def describe_preview(preview: Preview, generation: Generation) -> dict[str, Any]:
    """The data of a partial image, encoded in a thread."""
    size = (preview.width, preview.height)
    image = await generation.threads.run(
        "encoding", encode, preview.pixels, *size, generation.body.output_format, PREVIEW_QUALITY
    )
    return {
        "type": f"{generation.translated.events}.partial_image",
        "b64_json": image.base64(),
        "partial_image_index": preview.index,
        "image_index": preview.image,
        "width": preview.width,
        "height": preview.height,
        **openai_fields(generation.spec.form, generation.request.width, generation.request.height, int(time.time())),
    }


def describe_image(index: int, reply: Mapping[str, Any], form: EventForm, item: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a finished image: its `item`, and what the reply (as JSON) says of it."""
    return {
        "type": f"{form.events}.completed",
        **item,
        "image_index": index,
        "num_images": form.num_images,
        "seed": reply["seed"] + index,
        "has_nsfw_concepts": reply["has_nsfw_concepts"][index],
        **{name: reply[name] for name in ("prompt", "timings", "safety", "meta")},
        "usage": TokenUsage.of(reply["meta"]["usage"]["tokens_used"]).model_dump(),
        **openai_fields(form, item["width"], item["height"], reply["created"]),
    }


def openai_fields(form: EventForm, width: int, height: int, created: int) -> dict[str, Any]:
    """What OpenAI's events always have."""
    return {
        "size": f"{width}x{height}",
        "created_at": created,
        "output_format": form.output_format,
        "background": "opaque",
        "quality": "auto",
    }


async def format_running(event: Event, generation: Generation, *, named: bool, identity: str | None = None) -> bytes:
    """One event of a running generation. Progress is a comment where it is not wanted as an event (`named`)."""
    if isinstance(event, Preview):
        return format_event(await describe_preview(event, generation), identity)
    return format_progress(event, generation.spec.form, named=named, identity=identity)


def format_progress(progress: Progress, form: EventForm, *, named: bool, identity: str | None = None) -> bytes:
    data = describe_progress(progress, form)
    return format_event(data, identity) if named else f": progress {json.dumps(data)}\n\n".encode()


def format_image(index: int, reply: GenerationReply, generation: Generation) -> bytes:
    """A finished image, always with its bytes: OpenAI's SDKs count on them."""
    item = {"b64_json": generation.images[index].base64(), **reply.images[index].model_dump(exclude_none=True)}
    if generation.body.sync_mode:
        item.pop("url", None)  # the same bytes a second time
    shared = reply.model_dump(exclude_none=True, exclude={"images", "data"})
    return format_event(describe_image(index, shared, generation.spec.form, item))


async def stream_generation(generation: Generation, named: bool, request_id: str, path: str) -> AsyncGenerator[bytes]:
    """A generation's events, then its images or the error it ended with. Whoever stops reading cancels it."""
    replying = asyncio.ensure_future(generation.reply())
    replying.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # looked at, whoever reads
    try:
        async for _, event in generation.channel.read():
            yield await format_running(event, generation, named=named)
        reply = await replying
        for index in range(len(reply.images)):
            yield await generation.threads.run("encoding", format_image, index, reply, generation)
    except (PipelineError, ServerError) as error:
        log.warning("stream", request_id=request_id, error=type(error).__name__)
        yield format_event(envelope(error, request_id, path), name="error")
    except Exception as error:  # the reply has begun: this is its edge
        log.error("stream", request_id=request_id, error=type(error).__name__, exc_info=error)
        yield format_event(envelope(error, request_id, path), name="error")
    finally:
        generation.cancel()  # nothing to do if it has ended
        replying.cancel()


async def stream_job(
    jobs: JobService,
    record: JobRecord,
    active: ActiveJob | None,
    after: EventPosition,
    *,
    named: bool,
    store: Store | None,
    address: tuple[str, str] | None = None,
) -> AsyncGenerator[bytes]:
    """A job's events from behind `after`: its generation's while it runs, then its images or its error.

    With a `store` each image comes with its bytes, as in a stream without a job. `address` is the id and path of the
    request that made the job, which an error is the answer to.
    """
    try:
        if active and not after.images and (generation := await asyncio.shield(active.generation)):
            async for number, event in generation.channel.read(after.number):
                identity = EventPosition(0, number).format_id(jobs.epoch)
                yield await format_running(event, generation, named=named, identity=identity)
        elif record.request and jobs.is_elsewhere(record):
            form = EventForm.from_json(record.request)
            async for progress in jobs.follow_elsewhere(record):
                yield format_progress(progress, form, named=named)
        ended = await jobs.wait_ended(record)
        if address and ended.state == CANCELLED:
            raise JobCancelled
        outcome = json.loads(await jobs.read_outcome(ended))
        if ended.state != SUCCEEDED:
            yield format_event(readdress(outcome, *address) if address else outcome, name="error")
            return
        if ended.request is None:
            raise Gone("This job has expired.")
        form = EventForm.from_json(ended.request)
        for index, item in enumerate(outcome["images"]):
            if index >= after.images:
                shown = await jobs.threads.run("files", add_bytes, item, store) if store else item
                identity = EventPosition(index + 1).format_id(jobs.epoch)
                yield format_event(describe_image(index, outcome, form, shown), identity)
    except (PipelineError, ServerError) as error:
        yield format_event(envelope(error, *address_of(record, address)), name="error")
    except Exception as error:  # the reply has begun: this is its edge
        log.error("stream", job=record.id, error=type(error).__name__, exc_info=error)
        yield format_event(envelope(error, *address_of(record, address)), name="error")


def address_of(record: JobRecord, address: tuple[str, str] | None) -> tuple[str, str]:
    return address or (record.id, f"/v1/jobs/{record.id}")


def add_bytes(item: dict[str, Any], store: Store) -> dict[str, Any]:
    """A reply's item with its file in it, from wherever its URL leads. Raises `Gone`."""
    if "b64_json" in item:
        return item
    url = item["url"]
    if url.startswith("data:"):
        rest = {name: value for name, value in item.items() if name != "url"}
        return {"b64_json": url.partition(",")[2], **rest}
    image = store.read(url.partition("?")[0].rpartition("/")[2])
    return {"b64_json": base64.b64encode(image.data).decode("ascii"), **item}
