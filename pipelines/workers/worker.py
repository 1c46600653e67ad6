"""The child process that owns one device: it receives jobs from the pool and runs them in a step loop.

It alone imports torch. It takes jobs from the pool over a socket and sends back steps, pixels and failures. Between
any two steps it looks at its inbox, so a cancelled job ends within one step. It dies with its parent, and ends itself
when the device is lost: only a new process cures a sticky CUDA error.
"""

import os
import queue
import socket
import sys
import threading
from collections.abc import MutableMapping
from dataclasses import asdict
from typing import Any, NoReturn

import structlog

from pipelines import logs
from pipelines.allocator import configure_allocator
from pipelines.child_process import DEVICE_LOST, LOAD_FAILED, die_with_parent
from pipelines.engine.base import Engine, EngineConfig, StartAgain
from pipelines.workers.activity import Activity
from pipelines.workers.protocol import PREFIX, JobEvent, Message, encode_event
from pipelines.workers.step_loop import StepLoop

ENVIRONMENT = {  # for the libraries, set before they are imported
    "TRANSFORMERS_VERBOSITY": "error",  # their warnings quote prompts
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",  # serving never asks a hub for anything
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning take the cores from whoever encodes the picture
}
UNSENT = 16  # messages that wait to be sent; an image has up to 7 MiB
log = structlog.get_logger("srpo")


class Pipe:
    """The worker's end of the socket.

    A thread reads, so that pings are answered and the parent's death is noticed while a step runs. Another one sends,
    whole messages in their order, so that no step waits for the pixels of an image; if the parent does not read,
    sending waits in the end.
    """

    def __init__(self, sock: socket.socket, activity: Activity | None = None) -> None:
        self._sock = sock
        self._activity = activity or Activity()
        self._file = sock.makefile("rb")
        self.inbox: queue.Queue[Message] = queue.Queue()
        self._outbox: queue.Queue[tuple[bytes, bytes]] = queue.Queue(UNSENT)
        threading.Thread(target=self._send, name="pipe-sender", daemon=True).start()

    def start_reading(self) -> None:
        threading.Thread(target=self._read, name="pipe", daemon=True).start()

    def receive(self) -> Message:
        prefix = self._file.read(PREFIX.size)
        if len(prefix) < PREFIX.size:
            os._exit(0)  # the parent is gone
        header, payload = PREFIX.unpack(prefix)
        return Message.decode(self._file.read(header), self._file.read(payload))

    def send(self, event: str, payload: bytes = b"", **header: Any) -> None:
        """Queue a message. May be called from any thread."""
        self._outbox.put((Message({"event": event, **header}, payload).encode(), payload))

    def send_event(self, event: JobEvent) -> None:
        """As `send`, of a job."""
        message = encode_event(event)
        self._outbox.put((message.encode(), message.payload))

    def exit(self, code: int) -> NoReturn:
        """End the process when all that was queued has been sent."""
        self._outbox.join()
        os._exit(code)

    def _send(self) -> None:
        while True:
            for part in self._outbox.get():
                try:
                    self._sock.sendall(part)
                except OSError:
                    os._exit(0)  # the parent is gone
            self._outbox.task_done()

    def _read(self) -> None:
        while True:
            message = self.receive()
            if message.header["op"] != "ping":
                self.inbox.put(message)
            elif not self._outbox.full():  # else the pool hears of us anyway when it reads
                self.send("pong", **self._activity.report())


def receive_messages(pipe: Pipe, step_loop: StepLoop) -> None:
    """Handle all messages that have arrived; wait for one when there is nothing to do."""
    while step_loop.idle or not pipe.inbox.empty():
        step_loop.handle(*pipe.inbox.get())


def load(config: EngineConfig, pipe: Pipe, activity: Activity) -> Engine[Any]:
    """Build the engine. If that fails, the reason is sent to the pool and the process ends."""

    def report(stage: str, progress: float) -> None:
        activity.begin(f"load: {stage.partition(':')[0]}")  # a quick stage is no measure for another one
        pipe.send("loading", stage=stage, progress=progress)

    activity.begin("load")
    try:
        return config.build(report)
    except StartAgain as error:
        log.warning("worker_restarts", reason=str(error))
        pipe.exit(DEVICE_LOST)
    except Exception as error:
        log.error("load_failed", exc_info=error)
        pipe.send("load_failed", message=f"{type(error).__name__}: {error}")
        pipe.exit(LOAD_FAILED)


def configure_libraries(environment: MutableMapping[str, str]) -> None:
    """Set what libraries read when they are imported. An operator's own settings for the allocator are kept."""
    environment.update(ENVIRONMENT)
    configure_allocator(environment)


def main(fd: int, record: int) -> None:
    die_with_parent()
    configure_libraries(os.environ)
    activity = Activity(record)
    pipe = Pipe(socket.socket(fileno=fd), activity)
    config = EngineConfig(**pipe.receive().header)
    logs.configure(config.log_format)
    pipe.start_reading()
    engine = load(config, pipe, activity)
    activity.end()
    pipe.send("ready", **asdict(engine.info))
    step_loop = StepLoop(engine, pipe, pipe.exit, activity)
    while True:
        receive_messages(pipe, step_loop)
        step_loop.run_once()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
