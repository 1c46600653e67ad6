"""The real server with an engine that computes nothing, in a process that says what CPU it has used for what.

    python -m bench.support.stand_in '{"workers": 0, "settings": {...}}'

The process prints its port when it is ready, and its `Usage` as a line of JSON for each line that it reads.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

import uvicorn

from bench.support.instant import InstantPool, draw_noise
from bench.support.sleeping_engine import VARIABLE
from pipelines.engine.base import EngineConfig
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server import logs
from server.app import create_app
from server.cli.serve import configure_server
from server.engine_setup import build_engine_config
from server.process import memory
from server.process.threads import PoolName, ThreadPools
from server.settings.server import Settings

LOOP, ALL = "loop", "all"
Usage = dict[str, float]  # CPU seconds so far: of the event loop's thread, of the process, of each function in a thread
R = TypeVar("R")


class MeasuredPools(ThreadPools):
    """Counts the CPU seconds of what runs in threads, by pool and function."""

    usage: ClassVar[defaultdict[str, float]] = defaultdict(float)
    lock: ClassVar[threading.Lock] = threading.Lock()

    def _count(self, pool: PoolName, call: Callable[[], R]) -> R:
        start = time.thread_time()
        try:
            return super()._count(pool, call)
        finally:
            name = getattr(getattr(call, "func", call), "__name__", "?")
            with self.lock:
                self.usage[f"{pool}: {name}"] += time.thread_time() - start


class Server(uvicorn.Server):
    """Tells its port."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)


def make_pool(workers: int, settings: Settings) -> WorkerPool:
    """Of so many workers that sleep; of 0: one that answers at once."""
    if not workers:
        return InstantPool(build_engine_config(settings), draw_noise)
    config = EngineConfig("tiny", factory="bench.support.sleeping_engine:load", log_format="json")
    return WorkerPool(
        local_workers(config, ["cpu"] * workers),
        queue_size=settings.queue_size,
        max_running=settings.max_running,
        request_timeout=settings.request_timeout,
    )


def answer_questions() -> None:
    """Runs in a thread; the event loop's is the main one. Ends the process when there is nobody to ask any more."""
    clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
    for _ in sys.stdin:
        with MeasuredPools.lock:
            usage: Usage = dict(MeasuredPools.usage)
        usage |= {LOOP: time.clock_gettime(clock), ALL: time.process_time()}
        print(json.dumps(usage), flush=True)
    os._exit(0)


def main(workers: int, settings: Mapping[str, Any]) -> None:
    options = Settings(model="tiny", **settings)
    memory.fix_thresholds()
    logs.configure(options)
    with patch("server.state.ThreadPools", MeasuredPools):
        app = create_app(options, make_pool(workers, options))
    config = configure_server(app, options)
    config.port = 0
    threading.Thread(target=answer_questions, daemon=True).start()
    asyncio.run(Server(config).serve())


class StandIn:
    """The process, seen from outside."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the server has ended with {process.wait()}")
        self.port = int(port)

    def read_usage(self) -> Usage:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        usage: Usage = json.loads(self._process.stdout.readline())
        return usage


@contextmanager
def start_stand_in(workers: int = 0, plans: str = "{}", **settings: Any) -> Iterator[StandIn]:
    """A server with these settings and an empty data folder, whose engine answers at once.

    With `workers` it is one with so many worker processes, whose engines sleep by `plans`.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({"workers": workers, "settings": {"data_dir": folder, **settings}})
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.support.stand_in", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {VARIABLE: plans},
        )
        try:
            yield StandIn(process)
        finally:
            process.terminate()
            process.communicate()


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    main(spec["workers"], spec["settings"])
