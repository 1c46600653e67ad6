"""One worker process, seen from the pool: spawns it, exchanges messages with it and reports its death.

Death is noticed by a pidfd, because a grandchild that outlives the worker would hold its pipe open. The worker runs in
its own process group, and the whole group is killed. A worker that does not answer pings, or whose messages cannot be
handled, is killed: a process that nobody can talk to must not look ready.
"""

import asyncio
import contextlib
import os
import signal
import site
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from pipelines import logs
from pipelines.engine.base import EngineConfig, EngineInfo
from pipelines.workers.activity import ActivityReport, read_record
from pipelines.workers.patience import Heartbeat
from pipelines.workers.protocol import PREFIX, Message

LINE_LIMIT = 2**24  # bytes of a line that a worker prints
READ_AHEAD = 2**16  # bytes: all that a step says, many times over
READ_TO_END = 2.0  # seconds; a grandchild that escaped can hold the pipes open
PACKAGES = str(Path(__file__).parents[2])  # the folder with `pipelines`
log = structlog.get_logger("srpo")
CAPTURED: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def with_our_packages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a worker, which is started with `-P`: a file of the current folder is never imported.

    So a tree that is run without being installed must be named.
    """
    if PACKAGES in site.getsitepackages():
        return dict(environment)
    paths = [path for path in (environment.get("PYTHONPATH"), PACKAGES) if path]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


class MessageReader(asyncio.BufferedProtocol):
    """Reads a worker's messages off its pipe; `on_message` gets them one by one, and its exceptions go to `on_failure`.

    An image has megabytes. A `StreamReader` would copy it three times, each time into fresh memory, which takes the
    event loop longer than all else of the request. Here it goes into one buffer, used again and again, and from there
    into its own bytes. `ended` is done when the pipe is closed, or a message could not be handled.
    """

    def __init__(self, on_message: Callable[[Message], None], on_failure: Callable[[Exception], None]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_message = on_message
        self._on_failure = on_failure
        self._buffer = bytearray(READ_AHEAD)
        self._filled = 0

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's own
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        try:
            needed = self._take_messages()
        except Exception as error:  # noqa: BLE001 - whatever it was, it is told, and nothing more is heard
            self._end()
            self._on_failure(error)
        if self.ended.done():
            self._filled = 0
            return
        if needed > len(self._buffer):
            larger = bytearray(needed)
            larger[: self._filled] = memoryview(self._buffer)[: self._filled]
            self._buffer = larger

    def eof_received(self) -> bool:
        self._end()
        return True  # the other direction stays open until the death is reported

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the death is reported by another way
        self._end()

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _take_messages(self) -> int:
        """Hand on all messages that are there. Returns the bytes that the next one needs."""
        begin, view = 0, memoryview(self._buffer)
        needed = PREFIX.size
        while self._filled - begin >= PREFIX.size and not self.ended.done():
            header, payload = PREFIX.unpack_from(view, begin)
            middle = begin + PREFIX.size + header
            end = middle + payload
            if end > self._filled:
                needed = end - begin
                break
            message = Message.decode(bytes(view[begin + PREFIX.size : middle]), bytes(view[middle:end]))
            begin = end
            self._on_message(message)
        if begin:
            rest = bytes(view[begin : self._filled])
            self._buffer[: len(rest)] = rest
            self._filled = len(rest)
        return needed


class WorkerProcess:
    """A worker process. `info` is None until it is ready. `condemned`: it was killed, and has not been reaped yet."""

    def __init__(
        self,
        config: EngineConfig,
        environment: Mapping[str, str],
        on_event: Callable[["WorkerProcess", Message], None],
        on_condemned: Callable[[], None],
    ) -> None:
        """`on_condemned` is called when it is killed, or has died: the death is reported once all was heard."""
        self._config = config
        self._environment = environment
        self._on_event = on_event
        self._on_condemned = on_condemned
        self.info: EngineInfo | None = None
        self.stage = "starting"
        self.progress = 0.0
        self.heartbeat = Heartbeat()
        self.condemned = False
        self.suspects: frozenset[str] = frozenset()  # once it is dead: the jobs that it was working on
        self._ticks = ""  # of the processor that it had used when that was last looked at

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self, on_death: Callable[["WorkerProcess"], None]) -> None:
        """Spawn the process and begin to listen. `on_death` is called once, from the event loop.

        Raises `OSError` where no process can be started (no descriptors, no memory); nothing is left behind then.
        """
        with contextlib.ExitStack() as undo:
            await self._start(on_death, undo)
            undo.pop_all()

    async def _start(self, on_death: Callable[["WorkerProcess"], None], undo: contextlib.ExitStack) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        with theirs:
            self._record = os.memfd_create("jobs")
            undo.callback(os.close, self._record)
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a fork and exec of milliseconds, at start only
                [sys.executable, "-P", "-m", "pipelines.workers.worker", str(theirs.fileno()), str(self._record)],
                pass_fds=[theirs.fileno(), self._record],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env=with_our_packages(self._environment),
                **(CAPTURED if self._config.log_format == "json" else {}),
            )
        undo.callback(self._undo_spawn)
        self._pidfd = os.pidfd_open(self._process.pid)
        undo.callback(os.close, self._pidfd)
        self._writer, reader = await loop.create_connection(lambda: MessageReader(self._hear, self._give_up), sock=ours)
        self.send(self._config.to_json())
        self._listening = reader.ended
        self._listening.add_done_callback(lambda _: self.kill())
        self._logging = asyncio.create_task(self._log_output())
        self.dead = loop.create_future()
        loop.add_reader(self._pidfd, self._reap, on_death)

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Queue a message; never blocks. A message to a dead process is lost, and the death is reported."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(Message(header, payload).encode())
            if payload:
                self._writer.write(payload)

    def has_worked(self) -> bool:
        """Whether it has used a processor since the last call, or waits for one or a disk. A stopped one has not."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        state, *fields = stat.rpartition(")")[2].split()
        before, self._ticks = self._ticks, " ".join(fields[10:12])  # utime and stime of proc(5)
        return state in "RD" or self._ticks != before

    def _undo_spawn(self) -> None:
        self.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def kill(self) -> None:
        if not self.condemned:
            self.condemned = True
            self._on_condemned()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """Kill the process and wait until it is gone."""
        self.kill()
        await self.dead

    def _hear(self, message: Message) -> None:
        self.heartbeat.hear()
        if message.header["event"] == "pong":
            self.heartbeat.report = ActivityReport.parse(message.header)
        else:
            self._on_event(self, message)

    def _give_up(self, error: Exception) -> None:
        log.error("worker_message_failed", pid=self.pid, exc_info=error)

    async def _log_output(self) -> None:
        """Log what the worker prints. Not all is JSON: libraries have handlers of their own, and C++ knows no log."""
        if (output := self._process.stdout) is None:
            return
        reader = asyncio.StreamReader(limit=LINE_LIMIT)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), output)
        with contextlib.closing(transport):
            async for line in reader:
                logs.pass_on(line.decode(errors="replace").rstrip("\n"), pid=self.pid)

    def _reap(self, on_death: Callable[["WorkerProcess"], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self.kill()  # grandchildren, if any
        self._reporting = loop.create_task(self._report_death(on_death))

    async def _report_death(self, on_death: Callable[["WorkerProcess"], None]) -> None:
        """Read to the end (a finished image may still be in the pipe), then report the death."""
        _, unfinished = await asyncio.wait((self._listening, self._logging), timeout=READ_TO_END)
        for task in unfinished:
            task.cancel()
        self._writer.close()
        self.suspects = read_record(self._record)
        os.close(self._record)
        self.dead.set_result(None)
        on_death(self)
