"""One admitted request, from its place in the line to its reply. It does not know who waits for it, or how."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

import structlog

from pipelines.errors import Cancelled, PromptRefused, SafetyUnavailable
from pipelines.job import EventChannel, Job, PreviewPlan, Progress
from pipelines.request import ImageRequest, ImageResult
from pipelines.safety.guard import InspectedResult
from server.images.encoding import EncodedImage, encode_one
from server.jobs.delivery import ImageDelivery
from server.jobs.spec import JobSpec
from server.metrics.generations import GenerationMeter
from server.schema import Body, GenerationReply
from server.security.callers import Caller
from server.state import AppState
from server.translation.translated_request import TranslatedRequest
from server.usage.ledger import UsageEntry

BLURRED, SHARP = 32, 192  # longest side of a preview in pixels: no outline survives; an eighth of the largest image
log = structlog.get_logger("srpo")


class Generation:
    """A request that the pool has admitted."""

    def __init__(
        self,
        state: AppState,
        spec: JobSpec,
        request: ImageRequest,
        channel: EventChannel,
        job: Job,
        owner: str,
        *,
        durable: bool = False,
        reservation: str | None = None,
    ) -> None:
        self.spec = spec
        self.translated = spec.translated
        self.body = spec.body
        self.request = request
        self.channel = channel  # the pool's events, then those of the checks and the encoding
        self.job = job
        self.images: list[EncodedImage] = []
        self.delivery = ImageDelivery(state, spec.translated, spec.body, spec.base_url, durable=durable)
        self.usage: UsageEntry | None = None  # when it has images
        self.threads = state.threads
        self._owner = owner
        self._reservation = reservation
        self._state = state
        self._durable = durable
        self._meter = GenerationMeter(state.metrics, state.traces, request, spec.body.model, spec.trace)
        self._replying = False

    @classmethod
    def start(
        cls,
        state: AppState,
        spec: JobSpec,
        request: ImageRequest,
        caller: Caller,
        *,
        resumed: bool = False,
        durable: bool = False,
        reservation: str | None = None,
    ) -> Self:
        """Submit the caller's request. Raises what the pool's `submit` does, before any work.

        Raises `KeyLimitReached` too, unless the request is `resumed`: it has been accepted before. `durable`: it is a
        job's, which is not lost where its images cannot be stored for a time, and whose usage is written with its end.
        Another's usage is written before its reply, and takes the place of its `reservation`.
        """
        if not resumed:
            state.limits.check(caller)
        channel = EventChannel()
        job = state.pool.submit(request, preview_plan(state, spec.translated, spec.body), channel, caller.owner)
        if state.guard.overrules(spec.body.enable_safety_checker):  # said once, however often it was refused before
            spec.translated.ignore(["enable_safety_checker"])
        return cls(state, spec, request, channel, job, caller.owner, durable=durable, reservation=reservation)

    def cancel(self) -> None:
        """Stop the work within a step; nothing to do if it has ended."""
        self.delivery.cancel()
        self._state.pool.cancel(self.job)
        if not self._replying:
            self._meter.fail(Cancelled())
            self._state.usage.release(self._reservation)

    async def reply(self) -> GenerationReply:
        """The finished images, checked, encoded and delivered. Raises what went wrong. Await it once."""
        self._replying = True
        self._meter.enter()
        try:
            result = await self.job.result()
            self._meter.draw(result)
            result = self._state.constant.check(result)
            watch = Stopwatch()
            self._publish_stage("safety")
            inspected = await self._inspect(result)
            self._meter.stage("safety", watch.lap("safety"))
            self._publish_stage("encode")
            self.images = await encode_all(inspected, self.body.output_format, self._state)
            self._meter.stage("encode", watch.lap("encode"))
            self.job.drop_pixels()  # files are smaller, and a store may be away for long
            result = replace(inspected.result, pixels=())
            inspected = replace(inspected, result=result)
            items = await self.delivery.deliver(self.images)
            self._meter.stage("store", watch.lap("encode"))
            reply = GenerationReply.from_result(inspected, items, watch.seconds, self._state.settings)
            if self.translated.detailed:
                size = (self.request.width, self.request.height)
                reply = reply.with_details(size, self.body.output_format, reply.meta.usage.credits_used)
            pixels, price = self.request.pixels * len(items), reply.meta.usage.credits_used
            self.usage = usage = UsageEntry(self._owner, len(items), pixels, result.timings.device, price)
            self._meter.succeed(inspected, usage)
            if not self._durable:
                await self._state.usage.record(usage, self._reservation)
            return reply
        except (Exception, asyncio.CancelledError) as error:
            self._meter.fail(error)
            if self.usage is None:
                self._state.usage.release(self._reservation)
            raise
        finally:
            self.channel.close()

    def _publish_stage(self, stage: str) -> None:
        steps = self.request.steps
        self.channel.publish(Progress(stage, image=self.body.num_images - 1, step=steps, steps=steps))

    async def _inspect(self, result: ImageResult) -> InspectedResult:
        """The result with flagged images withheld. A checker that fails or hangs is a 503, never an unchecked image."""
        guard, wanted = self._state.guard, self.body.enable_safety_checker
        if not guard.checks(wanted):
            return guard.inspect(result, wanted)
        seconds = self._state.settings.safety_timeout
        with fail_closed(seconds):
            return await self._state.threads.run_within(seconds, "safety", guard.inspect, result, wanted)


async def check_prompt(prompt: str, state: AppState) -> None:
    """Refuse what the operator refuses, before any work. Checks that fail or hang are a 503."""
    if not state.prompts.checks:
        return
    seconds = state.settings.safety_timeout
    try:
        with fail_closed(seconds):
            await state.threads.run_within(seconds, "prompts", state.prompts.check, prompt)
    except PromptRefused as error:
        log.info("prompt_refused", reason=error.reason)
        raise


@contextmanager
def fail_closed(seconds: float) -> Iterator[None]:
    """A check that fails, or gave no verdict within `seconds`, is `SafetyUnavailable`, with its cause in the log."""
    try:
        yield
    except TimeoutError:
        log.error("safety", cause=f"no verdict within {seconds:g} s")
        raise SafetyUnavailable("timeout") from None
    except SafetyUnavailable as error:
        log.error("safety", cause=error.cause)
        raise


def start_headers(translated: TranslatedRequest, state: AppState) -> dict[str, str]:
    """The headers that are known before a generation is finished."""
    headers = {}
    if fingerprint := state.fingerprint:
        headers["x-engine-fingerprint"] = fingerprint
    if translated.ignored:
        headers["x-ignored-fields"] = translated.format_ignored()
    return headers


def reply_headers(reply: GenerationReply, translated: TranslatedRequest, state: AppState) -> dict[str, str]:
    usage = reply.meta.usage
    return start_headers(translated, state) | {
        "x-aimlapi-credits-used": str(usage.credits_used),
        "x-aimlapi-usd-spent": f"{usage.usd_spent:.8f}".rstrip("0").rstrip("."),
    }


def preview_plan(state: AppState, translated: TranslatedRequest, body: Body) -> PreviewPlan:
    """What may be shown of images that are not checked yet: a blur, unless nothing can be withheld at the end."""
    allowed = state.settings.previews
    if allowed == "none":
        return PreviewPlan()
    sharp = allowed == "sharp" or not state.guard.withholds(body.enable_safety_checker)
    return PreviewPlan(translated.partial_images, SHARP if sharp else BLURRED)


class Stopwatch:
    """Seconds of one stage after another; a stage that comes twice has the sum."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> float:
        """Returns the seconds since the lap before."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
        return elapsed


async def encode_all(inspected: InspectedResult, format: str, state: AppState) -> list[EncodedImage]:
    """Encode every image, each in a thread."""
    tasks = (
        state.threads.run("encoding", encode_one, inspected, index, format, state.settings, state.signer)
        for index in range(len(inspected.result.pixels))
    )
    return list(await asyncio.gather(*tasks))
