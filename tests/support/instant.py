"""The real app on a real socket, whose pool answers at once with a few black pixels: thousands of requests a minute."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from structlog.testing import capture_logs
from structlog.typing import EventDict

from bench.support.instant import InstantPool, draw_black
from server.app import create_app, served_headers
from server.engine_setup import build_engine_config
from server.settings.server import Settings
from server.transport.protocol import ConnectionLimits, limited_protocol


@contextmanager
def logged(folder: Path, **changed: Any) -> Iterator[tuple[Any, str, list[EventDict]]]:
    """The app on a loopback port, where it is, and what it logs."""
    config = Settings(data_dir=folder, model="tiny", no_fetch=True, **changed)
    app = create_app(config, InstantPool(build_engine_config(config), draw_black))
    limits = ConnectionLimits(
        config.header_timeout,
        config.body_timeout,
        config.max_connections,
        app.parts.metrics.count_connection,
        served_headers(app.parts.served),
    )
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
