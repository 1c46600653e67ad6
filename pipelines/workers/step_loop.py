"""A worker at work: which samples take the next step, and whose failure is whose. No torch.

Every turn is one piece of work, at most one step long, so that a cancel, a deadline or a new request waits for no
more than that. The job whose turn it is leads; samples of others, and further ones of its own, go along where the
engine can take them in the same forward pass without changing a bit. A pass that fails is taken again by each sample
alone: what is wrong with one request is that request's.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import structlog

from pipelines.child_process import DEVICE_LOST
from pipelines.engine.base import Engine
from pipelines.errors import GenerationFailed
from pipelines.job import PreviewPlan
from pipelines.logs import format_error
from pipelines.request import ImageRequest
from pipelines.workers.cost_model import CostModel
from pipelines.workers.run_queue import RunQueue

log = structlog.get_logger("srpo")


class EventSink(Protocol):
    """Where a worker's events go."""

    def send(self, event: str, payload: bytes = b"", **header: Any) -> None: ...


class WorkerJob:
    """One admitted request. `samples` are the images that are not finished, in order; `images` counts the others."""

    def __init__(self, job_id: str, request: ImageRequest, previews: PreviewPlan) -> None:
        self.id = job_id
        self.request = request
        self.preview_side = previews.side
        self.preview_steps = previews.steps(request.steps)
        self.samples: list[Any] | None = None
        self.images = 0
        self.seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        self.notes: dict[str, None] = {}  # a set that keeps its order
        self.received = time.monotonic()
        self.started: float | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - start

    def timings(self) -> dict[str, float]:
        started = self.started or time.monotonic()
        return {"queue": started - self.received, "inference": time.monotonic() - started, **self.seconds}

    def left(self, engine: Engine[Any]) -> float:
        """The part of the job's steps that is still to be done, from 1 to 0."""
        if self.samples is None:
            return 1.0
        steps = sum(engine.steps_left(sample) for sample in self.samples)
        return steps / (self.request.steps * len(self.request.seeds))


class JobSample(NamedTuple):
    """A sample, and the job it belongs to."""

    job: WorkerJob
    sample: Any


class StepLoop:
    """The running jobs of one worker, and the engine that draws them."""

    def __init__(self, engine: Engine[Any], events: EventSink, exit_process: Callable[[int], Any] = os._exit) -> None:
        self._engine = engine
        self._events = events
        self._exit = exit_process
        self._queue: RunQueue[WorkerJob] = RunQueue()
        self._cost_model = CostModel()

    @property
    def idle(self) -> bool:
        return not self._queue

    def take(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """What the pool says: a new job (with its source's pixels), or that one is no longer wanted."""
        match header["op"]:
            case "run":
                request = ImageRequest.from_json(header["request"], payload)
                job = WorkerJob(header["job"], request, PreviewPlan(**header["previews"]))
                self._queue.add(job.id, job, self._cost_model.seconds(request))
            case "cancel":
                self._queue.drop(header["job"])

    def run_once(self) -> None:
        """Do the next piece of work."""
        lead = self._queue.next()
        with self._fail_alone(lead):
            self._prepare(lead)
            assert lead.samples
            if self._engine.steps_left(lead.samples[0]):
                self._step(self._collect_batch(lead))
            else:
                self._finish(lead)

    def _prepare(self, job: WorkerJob) -> None:
        if job.samples is None:
            job.started = time.monotonic()
            self._send_progress(job, "text")
            with job.timed("text"):
                job.samples = self._engine.prepare(job.request)

    def _collect_batch(self, lead: WorkerJob) -> list[JobSample]:
        """The lead's first sample, and those that the engine steps with it; jobs that have not begun begin for it."""
        limit = self._engine.batch_limit(lead.request)
        items: list[JobSample] = []
        for job in (lead, *(job for job in self._queue.ranked() if job is not lead)):
            if len(items) >= limit:
                break
            if (job.request.width, job.request.height) == (lead.request.width, lead.request.height):
                with self._fail_alone(job):
                    self._prepare(job)
                    assert job.samples
                    items += [JobSample(job, sample) for sample in job.samples if self._engine.steps_left(sample)]
        chosen = self._engine.select_batch([item.sample for item in items])
        return [item for item in items if any(item.sample is sample for sample in chosen)]

    def _step(self, batch: list[JobSample]) -> None:
        """One step of all; if they cannot take it together, of each alone."""
        before = [self._engine.steps_left(item.sample) for item in batch]
        start = time.monotonic()
        together = self._try_together(batch)
        for item, steps in zip(batch, before, strict=True):
            if not together and item.job.id in self._queue and self._engine.steps_left(item.sample) == steps:
                with self._fail_alone(item.job):
                    self._engine.step([item.sample])
        share = (time.monotonic() - start) / len(batch)
        for item in batch:
            if item.job.id in self._queue:
                with self._fail_alone(item.job):
                    self._record_step(item, share)

    def _try_together(self, batch: list[JobSample]) -> bool:
        """Step all at once; False if that failed (its traceback, and what it holds in memory, is gone by then)."""
        try:
            self._engine.step([item.sample for item in batch])
            return True
        except Exception as error:
            if len(batch) == 1:
                raise
            self._log("batch_failed", error, *(item.job for item in batch))
            if self._engine.failure(error) is None:
                self._exit(DEVICE_LOST)
            return False

    def _record_step(self, item: JobSample, seconds: float) -> None:
        """Account for a step, and tell who watches."""
        job, sample = item
        assert job.samples is not None
        job.seconds["denoise"] += seconds
        left = job.left(self._engine)
        self._queue.advance(job.id, 1 - left)
        image = job.images + next(index for index, other in enumerate(job.samples) if other is sample)
        step = job.request.steps - self._engine.steps_left(sample)
        self._send_progress(job, "denoise", image, step, left)
        if step in job.preview_steps and (thumbnail := self._engine.preview(sample, job.preview_side)):
            where = {"image": image, "index": job.preview_steps.index(step)}
            size = {"width": thumbnail.width, "height": thumbnail.height}
            self._events.send("preview", thumbnail.data, job=job.id, **size, **where)

    def _finish(self, job: WorkerJob) -> None:
        """Decode the first image, which has no steps left; with the last one the job is done."""
        assert job.samples
        self._send_progress(job, "decode", job.images, job.request.steps, job.left(self._engine))
        with job.timed("decode"):
            picture = self._engine.finish(job.samples[0])
        self._events.send("image", picture.data, job=job.id, image=job.images)
        job.notes.update(dict.fromkeys(picture.notes))
        job.images += 1
        del job.samples[0]
        if not job.samples:
            self._queue.drop(job.id)
            self._cost_model.drawn(job.request, job.seconds)
            self._events.send("done", job=job.id, timings=job.timings(), notes=list(job.notes))

    def _send_progress(self, job: WorkerJob, stage: str, image: int = 0, step: int = 0, left: float = 1.0) -> None:
        self._events.send("step", job=job.id, stage=stage, image=image, step=step, left=left)

    @contextmanager
    def _fail_alone(self, job: WorkerJob) -> Iterator[None]:
        """What is raised inside ends this job, and no other."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a job raises must not end its neighbours
            self._queue.drop(job.id)
            name = type(error).__name__ if isinstance(error, GenerationFailed) else self._engine.failure(error)
            if not isinstance(error, GenerationFailed):
                self._log("job_failed", error, job)
            if name is None:
                self._exit(DEVICE_LOST)
            self._events.send("failed", job=job.id, error=name)

    def _log(self, event: str, error: Exception, *jobs: WorkerJob) -> None:
        """The traceback, without anybody's prompt."""
        text = format_error(error, [job.request.prompt for job in jobs])
        log.error(event, jobs=[job.id for job in jobs], exception=text)
