"""How `srpo serve` ends: what was accepted is finished within the grace, and then the process is gone, whatever hangs.

The first signal drains. A second one ends the process at once; durable jobs are resumed by the next server. A thread
that hangs (a moderation service that does not answer, a disk that does not come back) cannot be ended from outside, and
Python would wait for it for ever, so the process is then left without its consent.
"""

import os
import socket
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn
from rich.console import Console

from server.cli.terminal import banner
from server.jobs.service import JobService
from server.state import AppState

MARGIN = 5.0  # seconds after the grace, in which workers are stopped and jobs are written down
FORCED = 1  # exit code where something hung for longer than the grace and the margin
log = structlog.get_logger("srpo")


class DrainingServer(uvicorn.Server):
    """uvicorn, but a signal to stop also makes the pool refuse new work, and is obeyed in time."""

    def __init__(self, config: uvicorn.Config, parts: AppState, jobs: JobService, console: Console) -> None:
        super().__init__(config)
        self._parts = parts
        self._jobs = jobs
        self.console = console
        self._signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + sig)  # as a shell reports it; workers die with their parent
        self._signalled = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._parts.pool.drain()
        self._jobs.finish_by = time.monotonic() + self._parts.settings.shutdown_grace
        banner.show_stopping(self.console, self._parts)
        limit = threading.Timer(self._parts.settings.shutdown_grace + MARGIN, self._force)
        limit.daemon = True
        limit.start()
        await super().shutdown(sockets)

    def _force(self) -> None:
        """Called in a thread of its own: the event loop may be what hangs."""
        log.error(
            "exit_forced", seconds=self._parts.settings.shutdown_grace + MARGIN, threads=self._parts.threads.running()
        )
        leave(FORCED)


def leave_if_threads_hang(parts: AppState, code: int) -> None:
    """End the process here and now if the interpreter's own end would wait for a thread of a pool."""
    if threads := parts.threads.running():
        log.warning("threads_left", threads=threads)
        leave(code)


def leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
