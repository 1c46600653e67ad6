"""The real app on a real socket, whose pool answers at once with a few black pixels: thousands of requests a minute."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from structlog.testing import capture_logs
from structlog.typing import EventDict

from pipelines.engine.base import EngineInfo
from pipelines.job import Job
from pipelines.request import ImageRequest, ImageResult, Timings
from pipelines.workers.pool import WorkerPool
from server.api.protocol import ConnectionLimits, limited_protocol
from server.app import create_app
from server.settings.server import Settings
from server.state import build_engine_config


class InstantPool(WorkerPool):
    """Every request is done when it is submitted: 16 by 16 black pixels an image."""

    async def start(self) -> None:
        self._started = time.monotonic()
        self._info = EngineInfo("tiny", "cpu", "float32", "f" * 32)

    async def stop(self) -> None:
        pass

    def submit(self, request: ImageRequest, previews: object = None, channel: object = None, tenant: str = "") -> Job:
        job = Job("job", request, deadline=math.inf)
        black = tuple(bytes(16 * 16 * 3) for _ in request.seeds)
        job.finish(ImageResult(replace(request, width=16, height=16), black, Timings()))
        return job


@contextmanager
def logged(folder: Path, **changed: Any) -> Iterator[tuple[Any, str, list[EventDict]]]:
    """The app on a loopback port, where it is, and what it logs."""
    config = Settings(data_dir=folder, model="tiny", no_fetch=True, **changed)
    app = create_app(config, InstantPool(build_engine_config(config)))
    limits = ConnectionLimits(config.header_timeout, config.body_timeout, config.max_connections)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=limited_protocol(limits), ws="none", lifespan="on", log_config=None)
    )
    thread = threading.Thread(target=server.run)
    with capture_logs() as entries:
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield app, "http://{}:{}".format(*server.servers[0].sockets[0].getsockname()), entries
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def served(folder: Path, **changed: Any) -> Iterator[tuple[Any, str]]:
    """As `logged`, for whoever does not read the log."""
    with logged(folder, **changed) as (app, url, _):
        yield app, url
