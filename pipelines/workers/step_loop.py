"""The step loop of a worker: chooses the samples of the next step, and keeps failures to their own job. No torch.

One iteration does at most one step, so that a cancellation, a deadline or a new request waits for no longer than that.
The first sample of the job at the head of the queue takes the step, in one batch with those samples of this and other
jobs that the engine can compute in the same forward pass without changing a bit. A batch that fails is
repeated one sample at a time, so that only the faulty request fails.
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
from pipelines.queueing.cost_model import CostModel
from pipelines.queueing.run_queue import RunQueue
from pipelines.request import ImageRequest, Stage, Timings
from pipelines.workers.activity import Activity
from pipelines.workers.protocol import ImageReady, JobDone, JobEvent, JobFailed, PreviewReady, StepDone

log = structlog.get_logger("srpo")


class EventSink(Protocol):
    """Sends what becomes of jobs to the pool."""

    def send_event(self, event: JobEvent) -> None: ...


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
        self.stages: list[Stage] = []  # in their order; those that follow one of the same name are one with it
        self.notes: dict[str, None] = {}  # a set that keeps its order
        self.received = time.monotonic()
        self.started: float | None = None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] += time.monotonic() - start
        self.note_stage(stage, start)

    def note_stage(self, name: str, start: float) -> None:
        """A part of a stage, from `start` (on the monotonic clock) until now."""
        begun = self.started or start
        end = time.monotonic() - begun
        if self.stages and self.stages[-1].name == name:
            self.stages[-1] = self.stages[-1]._replace(end=end)
        else:
            self.stages.append(Stage(name, start - begun, end))

    def timings(self) -> Timings:
        started = self.started or time.monotonic()
        return Timings(queue=started - self.received, inference=time.monotonic() - started, **self.seconds)

    def remaining_fraction(self, engine: Engine[Any]) -> float:
        """The part of the job's steps that remains, from 1 to 0."""
        if self.samples is None:
            return 1.0
        steps = sum(engine.steps_left(sample) for sample in self.samples)
        return steps / (self.request.steps * len(self.request.seeds))


class JobSample(NamedTuple):
    """A sample, and the job it belongs to."""

    job: WorkerJob
    sample: Any


def megapixels(request: ImageRequest) -> float:
    return request.pixels / 2**20


def size_of(batch: list[JobSample]) -> float:
    """Megapixels of a forward pass."""
    return sum(megapixels(item.job.request) for item in batch)


class StepLoop:
    """The running jobs of one worker, and the engine that draws them."""

    def __init__(
        self,
        engine: Engine[Any],
        events: EventSink,
        exit_process: Callable[[int], Any] = os._exit,
        activity: Activity | None = None,
    ) -> None:
        self._engine = engine
        self._events = events
        self._exit = exit_process
        self._activity = activity or Activity()
        self._queue: RunQueue[WorkerJob] = RunQueue()
        self._cost_model = CostModel()

    @property
    def idle(self) -> bool:
        return not self._queue

    def handle(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Handle a message from the pool: a new job (with its source's pixels), or the cancellation of one."""
        match header["op"]:
            case "run":
                request = ImageRequest.from_json(header["request"], payload)
                job = WorkerJob(header["job"], request, PreviewPlan(**header["previews"]))
                self._queue.add(job.id, job, self._cost_model.estimate_seconds(request), header.get("tenant", ""))
            case "cancel":
                self._queue.remove(header["job"])

    def run_once(self) -> None:
        """Do one step of a batch, or decode one image."""
        head = self._queue.peek()
        with self._isolate_failure(head):
            self._prepare(head)
            assert head.samples
            if self._engine.steps_left(head.samples[0]):
                self._step(self._collect_batch(head))
            else:
                self._finish(head)

    def _prepare(self, job: WorkerJob) -> None:
        if job.samples is None:
            job.started = time.monotonic()
            self._events.send_event(StepDone(job.id, "text", image=0, step=0, remaining_fraction=1.0))
            with job.timed("text"), self._activity.doing("text", 1.0, [job.id]):
                job.samples = self._engine.prepare(job.request)
            self._activity.statistics = self._engine.statistics()

    def _collect_batch(self, head: WorkerJob) -> list[JobSample]:
        """The lead's first sample, and those that the engine steps with it; jobs that have not begun begin for it."""
        limit = self._engine.batch_limit(head.request)
        items: list[JobSample] = []
        for job in (head, *(job for job in self._queue.by_priority() if job is not head)):
            if len(items) >= limit:
                break
            if (job.request.width, job.request.height) == (head.request.width, head.request.height):
                with self._isolate_failure(job):
                    self._prepare(job)
                    assert job.samples
                    items += [JobSample(job, sample) for sample in job.samples if self._engine.steps_left(sample)]
        chosen = self._engine.select_batch([item.sample for item in items])
        return [item for item in items if any(item.sample is sample for sample in chosen)]

    def _step(self, batch: list[JobSample]) -> None:
        """One step of all samples; if the batch fails, of each sample alone."""
        before = [self._engine.steps_left(item.sample) for item in batch]
        start = time.monotonic()
        with self._activity.doing("denoise", size_of(batch), [item.job.id for item in batch]):
            done = self._try_batch(batch)
        for item, steps in zip(batch, before, strict=True):
            if not done and item.job.id in self._queue and self._engine.steps_left(item.sample) == steps:
                with (
                    self._isolate_failure(item.job),
                    self._activity.doing("denoise", size_of([item]), [item.job.id]),
                ):
                    self._engine.step([item.sample])
        seconds = time.monotonic() - start
        for index, item in enumerate(batch):
            if item.job.id in self._queue:
                with self._isolate_failure(item.job):
                    item.job.note_stage("denoise", start)
                    self._record_step(item, seconds, len(batch), leads=index == 0)

    def _try_batch(self, batch: list[JobSample]) -> bool:
        """Step all samples at once; False if that failed (the traceback, which holds tensors, is freed by then)."""
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

    def _record_step(self, item: JobSample, seconds: float, batch: int, leads: bool) -> None:
        """Account for a step in a pass of `batch` samples, and send its progress and its preview.

        One of them `leads`: what the whole pass took is told with its step.
        """
        job, sample = item
        assert job.samples is not None
        job.seconds["denoise"] += seconds / batch
        remaining_fraction = job.remaining_fraction(self._engine)
        self._queue.advance(job.id, 1 - remaining_fraction)
        image = job.images + next(index for index, other in enumerate(job.samples) if other is sample)
        step = job.request.steps - self._engine.steps_left(sample)
        progress = StepDone(job.id, "denoise", image, step, remaining_fraction, seconds, batch if leads else 0)
        self._events.send_event(progress)
        if step not in job.preview_steps:
            return
        with job.timed("denoise"), self._activity.doing("preview", size_of([item]), [job.id]):  # it waits for the step
            thumbnail = self._engine.preview(sample, job.preview_side)
        if thumbnail:
            index, size = job.preview_steps.index(step), (thumbnail.width, thumbnail.height)
            self._events.send_event(PreviewReady(job.id, image, index, *size, thumbnail.data))

    def _finish(self, job: WorkerJob) -> None:
        """Decode the first image, which has no steps left; with the last one the job is done."""
        assert job.samples
        left = job.remaining_fraction(self._engine)
        self._events.send_event(StepDone(job.id, "decode", job.images, job.request.steps, left))
        with job.timed("decode"), self._activity.doing("decode", megapixels(job.request), [job.id]):
            picture = self._engine.finish(job.samples[0])
        self._activity.statistics = self._engine.statistics()
        self._events.send_event(ImageReady(job.id, job.images, picture.data))
        job.notes.update(dict.fromkeys(picture.notes))
        job.images += 1
        del job.samples[0]
        if not job.samples:
            self._queue.remove(job.id)
            timings = job.timings()
            self._cost_model.record_job(job.request, timings)
            self._events.send_event(JobDone(job.id, timings, tuple(job.stages), tuple(job.notes)))

    @contextmanager
    def _isolate_failure(self, job: WorkerJob) -> Iterator[None]:
        """An exception inside ends this job and no other one."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a job raises must not end its neighbours
            self._queue.remove(job.id)
            name = type(error).__name__ if isinstance(error, GenerationFailed) else self._engine.failure(error)
            if not isinstance(error, GenerationFailed):
                self._log("job_failed", error, job)
            if name is None:
                self._exit(DEVICE_LOST)
            else:
                self._events.send_event(JobFailed(job.id, name))

    def _log(self, event: str, error: Exception, *jobs: WorkerJob) -> None:
        """The traceback, without anybody's prompt."""
        text = format_error(error, [job.request.prompt for job in jobs])
        log.error(event, jobs=[job.id for job in jobs], exception=text)
