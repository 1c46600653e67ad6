"""The child process that owns one device: admit, schedule, step, finish.

It alone imports torch. It takes jobs from the pool over a socket and sends back steps, pixels and failures. Between
any two steps it looks at its inbox, so a cancelled job ends within one step. It dies with its parent, and ends itself
when the device is lost: only a new process cures a sticky CUDA error.
"""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from pipelines.engine import Engine, EngineConfig
from pipelines.errors import GenerationFailed
from pipelines.frames import PREFIX, Frame
from pipelines.job import PreviewPlan
from pipelines.pace import Pace
from pipelines.request import ImageRequest
from pipelines.scheduler import Turns

DEVICE_LOST = 70  # exit codes, from sysexits.h
LOAD_FAILED = 78
PR_SET_PDEATHSIG = 1
ENVIRONMENT = {  # for the libraries, set before they are imported
    "TRANSFORMERS_VERBOSITY": "error",  # their warnings quote prompts
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",  # serving never asks a hub for anything
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning take the cores from whoever encodes the picture
}


class Pipe:
    """The worker's end of the socket. A thread reads, so that the parent's death is noticed while a step runs."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")
        self.inbox: queue.Queue[Frame] = queue.Queue()

    def start_reading(self) -> None:
        threading.Thread(target=self._read, name="pipe", daemon=True).start()

    def receive(self) -> Frame:
        prefix = self._file.read(PREFIX.size)
        if len(prefix) < PREFIX.size:
            os._exit(0)  # the parent is gone: nobody is left to answer
        header, payload = PREFIX.unpack(prefix)
        return Frame.decode(self._file.read(header), self._file.read(payload))

    def send(self, event: str, payload: bytes = b"", **header: Any) -> None:
        self._sock.sendall(Frame({"event": event, **header}, payload).encode())
        if payload:
            self._sock.sendall(payload)

    def _read(self) -> None:
        while True:
            self.inbox.put(self.receive())


class RunningJob:
    """One admitted request: its samples are drawn one after the other, a step a turn."""

    def __init__(self, job_id: str, request: ImageRequest, previews: PreviewPlan) -> None:
        self.id = job_id
        self.request = request
        self.preview_side = previews.side
        self.preview_steps = previews.steps(request.num_inference_steps)
        self.samples: list[Any] | None = None
        self.images = 0
        self.seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
        self.notes: dict[str, None] = {}  # a set that keeps its order
        self.received = time.monotonic()
        self.started: float | None = None

    def advance(self, engine: Engine[Any], pipe: Pipe) -> bool:
        """Do the next piece of work, at most one step long. True when the job is done."""
        if self.samples is None:
            self.started = time.monotonic()
            self.tell(pipe, "text")
            with self.timed("text"):
                self.samples = engine.prepare(self.request)
        sample = self.samples[0]
        if engine.steps_left(sample):
            with self.timed("denoise"):
                engine.step([sample])
                step = self.request.num_inference_steps - engine.steps_left(sample)
                self.tell(pipe, "denoise", step)
                if step in self.preview_steps:
                    self.show(engine, sample, step, pipe)
            return False
        self.tell(pipe, "decode", self.request.num_inference_steps)
        with self.timed("decode"):
            picture = engine.finish(sample)
        pipe.send("image", picture.data, job=self.id, image=self.images)
        self.notes.update(dict.fromkeys(picture.notes))
        self.images += 1
        del self.samples[0]
        return not self.samples

    def tell(self, pipe: Pipe, stage: str, step: int = 0) -> None:
        pipe.send("step", job=self.id, stage=stage, image=self.images, step=step)

    def show(self, engine: Engine[Any], sample: Any, step: int, pipe: Pipe) -> None:
        """Send a preview, unless the model has no map from latents to colours."""
        if thumbnail := engine.preview(sample, self.preview_side):
            where = {"image": self.images, "index": self.preview_steps.index(step)}
            pipe.send("preview", thumbnail.data, job=self.id, width=thumbnail.width, height=thumbnail.height, **where)

    def timed(self, stage: str) -> "Stopwatch":
        return Stopwatch(self.seconds, stage)

    def timings(self) -> dict[str, float]:
        started = self.started or time.monotonic()
        return {"queue": started - self.received, "inference": time.monotonic() - started, **self.seconds}

    def done(self, engine: Engine[Any]) -> float:
        """The part of the work that is behind it, from 0 to 1, in steps."""
        if self.samples is None:
            return 0.0
        steps = self.request.num_inference_steps
        current = steps - engine.steps_left(self.samples[0]) if self.samples else 0
        return (self.images + current / steps) / len(self.request.seeds)


class Stopwatch:
    """Adds the time spent inside to one entry of a dict of seconds."""

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds = seconds
        self._stage = stage

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._stage] += time.monotonic() - self._start


def admit(pipe: Pipe, turns: Turns[RunningJob], pace: Pace) -> None:
    """Take what the pool has sent; wait for it when there is nothing to do."""
    while not turns or not pipe.inbox.empty():
        header = pipe.inbox.get().header
        match header["op"]:
            case "run":
                request, previews = ImageRequest.from_json(header["request"]), PreviewPlan(**header["previews"])
                job = RunningJob(header["job"], request, previews)
                turns.add(job.id, job, pace.seconds(request))
            case "cancel":
                turns.drop(header["job"])


def advance(job: RunningJob, engine: Engine[Any], turns: Turns[RunningJob], pipe: Pipe, pace: Pace) -> None:
    """One turn of one job. A failure is that job's alone."""
    try:
        ended = job.advance(engine, pipe)
        turns.advance(job.id, job.done(engine))
        if ended:
            turns.drop(job.id)
            pace.drawn(job.request, job.seconds)
            pipe.send("done", job=job.id, timings=job.timings(), notes=list(job.notes))
    except Exception as error:  # noqa: BLE001 - whatever a job raises must not end its neighbours
        turns.drop(job.id)
        name = type(error).__name__ if isinstance(error, GenerationFailed) else engine.failure(error)
        if not isinstance(error, GenerationFailed):
            print(traceback.format_exc().replace(job.request.prompt, "[prompt]"), file=sys.stderr, flush=True)
        if name is None:
            os._exit(DEVICE_LOST)
        pipe.send("failed", job=job.id, error=name)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent dies, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def load(config: EngineConfig, pipe: Pipe) -> Engine[Any]:
    """Build the engine. What is wrong with the files or the device is told to the pool, and the process ends."""
    try:
        return config.build(lambda stage, progress: pipe.send("loading", stage=stage, progress=progress))
    except Exception as error:  # noqa: BLE001 - the pool tells the person why
        traceback.print_exc()
        pipe.send("load_failed", message=f"{type(error).__name__}: {error}")
        os._exit(LOAD_FAILED)


def main(fd: int) -> None:
    die_with_parent()
    os.environ.update(ENVIRONMENT)
    pipe = Pipe(socket.socket(fileno=fd))
    config = EngineConfig(**pipe.receive().header)
    pipe.start_reading()
    engine = load(config, pipe)
    info = engine.info
    pipe.send("ready", model=info.model, device=info.device, dtype=info.dtype, fingerprint=info.fingerprint)
    turns: Turns[RunningJob] = Turns()
    pace = Pace()
    while True:
        admit(pipe, turns, pace)
        if turns:
            advance(turns.next(), engine, turns, pipe, pace)


if __name__ == "__main__":
    main(int(sys.argv[1]))
