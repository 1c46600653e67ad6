"""A server in a thread whose engine does what the prompt says; durable jobs on it."""

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from support.server import START_LIMIT, free_port

from pipelines.engine.base import EngineConfig
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.app import create_app
from server.settings.server import Settings


class Scripted:
    """A server in a thread whose engine does what the prompt says. `loading`: until the folder has a file `loaded`.

    `statuses` are those of its replies to requests for images, as they began.
    """

    def __init__(self, folder: Path, queue_size: int = 200, loading: bool = False, **options: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.loading = loading
        self.statuses: list[int] = []
        config = EngineConfig(
            factory="support.scripted_engine:load", model="gated" if loading else "tiny", models_dir=str(folder)
        )
        settings = Settings(data_dir=folder, model="tiny", port=self.port, **options)
        workers, timeout = local_workers(config), settings.request_timeout
        self.pool = WorkerPool(workers, queue_size=queue_size, max_running=1, request_timeout=timeout)
        self.app = create_app(settings, self.pool)
        self.server = uvicorn.Server(
            uvicorn.Config(self.recorded, interface="asgi3", port=self.port, log_config=None, ws="none")
        )
        self.thread = threading.Thread(target=self.server.run)

    async def recorded(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def record(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"].startswith("/v1/images/"):
                self.statuses.append(message["status"])
            await send(message)

        await self.app(scope, receive, record)

    def __enter__(self) -> "Scripted":
        self.thread.start()
        self.until(lambda: self.server.started and (self.loading or self.pool.status().state == "ready"))
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    @property
    def in_flight(self) -> int:
        """Jobs that run or wait, as `/health` reports them."""
        health = httpx.get(f"{self.url}/health").json()
        count: int = health["running"] + health["waiting"]
        return count

    @property
    def waiting_clients(self) -> int:
        """How many requests wait for a picture that a retry can join."""
        return sum(shared.waiting for same in self.app.jobs.joins._open.values() for shared in same)

    @staticmethod
    def until(condition: Any) -> None:
        deadline = time.monotonic() + START_LIMIT
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


class Gate:
    """Lets the scripted engine do so many steps, and tells how many it has begun."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._begun, self._allowed = folder / "begun", folder / "allowed"
        self.prompt = f"gated {folder}"
        self._begun.touch()
        self.allow(0)

    def allow(self, steps: int) -> None:
        self._allowed.write_bytes(b"." * steps)

    @property
    def begun(self) -> int:
        return self._begun.stat().st_size
