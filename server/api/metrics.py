"""`/metrics`: what Prometheus scrapes, on the server's own port or on one of its own."""

import asyncio
from collections.abc import Iterator

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.dependencies import AnyCaller
from server.api.health import find_readiness
from server.errors import NotFound, ServerError
from server.jobs.service import JobService
from server.metrics.readings import CardReader, Exposition, Reading, read_disk, read_pool, read_store
from server.metrics.table import (
    BUILD_INFO,
    BUSY_THREADS,
    CONSTANT_IMAGES,
    JOBS,
    JOBS_UNWRITTEN,
    LOOP_LAG,
    READY,
    UPLOAD_BYTES,
)
from server.process.loop_watch import LoopWatch
from server.process.threads import POOLS
from server.security.origins import LOOPBACK_NAMES, host_of
from server.settings.types import is_loopback
from server.state import AppState
from weights.version import read_version

PATIENCE = 2.0  # seconds for what may take long; what takes longer is missing from the scrape
PATH = "/metrics"
router = APIRouter(include_in_schema=False)


class MetricsPage:
    """What `/metrics` shows of one app."""

    def __init__(self, state: AppState, jobs: JobService, watch: LoopWatch) -> None:
        self._state = state
        self._jobs = jobs
        self._watch = watch
        self._version = read_version()
        self._cards = CardReader()
        self._slow: asyncio.Future[list[Reading]] | None = None  # one at a time, or a slow disk would fill the pool

    async def render(self, accept: str) -> Response:
        """The page, in the format that the client accepts."""
        slow = await self._read_slow()
        encode, content_type = choose_encoder(accept)
        page = encode(Exposition(self._state.metrics.registry, [*self._read(), *slow]))
        return Response(page, headers={"content-type": content_type})

    def _read(self) -> Iterator[Reading]:
        state = self._state
        yield Reading(BUILD_INFO, 1, (self._version,))
        yield Reading(READY, find_readiness(state, self._jobs).ready)
        yield from read_pool(state.pool)
        yield from read_store(state.store)
        yield Reading(JOBS_UNWRITTEN, self._jobs.unwritten)
        yield Reading(CONSTANT_IMAGES, state.constant.count)
        yield Reading(UPLOAD_BYTES, state.uploads.taken)
        yield Reading(LOOP_LAG, self._watch.lag)
        busy = state.threads.running()
        for name in POOLS:
            yield Reading(BUSY_THREADS, busy.get(name, 0), (name,))

    async def _read_slow(self) -> list[Reading]:
        """What a thread reads: from the disk, the database and the driver."""
        if self._slow is None or self._slow.done():
            self._slow = asyncio.ensure_future(self._state.threads.run("metrics", self._read_in_thread))
        await asyncio.wait((self._slow,), timeout=PATIENCE)
        return self._slow.result() if self._slow.done() else []

    def _read_in_thread(self) -> list[Reading]:
        readings = [*read_disk(self._state.settings.data_dir), *self._cards.read()]
        try:
            counts = self._jobs.count_by_state()
        except ServerError:  # a full disk or a locked database has metrics of its own
            return readings
        return readings + [Reading(JOBS, count, (name,)) for name, count in counts.items()]


@router.api_route(PATH, methods=["GET", "HEAD"])
async def show_metrics(request: Request, caller: AnyCaller) -> Response:
    """Metrics in Prometheus' format. 404 where they have a port of their own."""
    page: MetricsPage | None = request.app.metrics_page
    if page is None:
        raise NotFound
    caller.require("metrics")
    return await page.render(request.headers.get("accept", ""))


class MetricsPort:
    """ASGI middleware: on connections to `port` there are metrics, without a key, and nothing else."""

    def __init__(self, app: ASGIApp, page: MetricsPage, host: str, port: int) -> None:
        self._app = app
        self._page = page
        self._port = port
        self._hosts = LOOPBACK_NAMES if is_loopback(host) else ()  # so that no web page can read them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["server"] or ("", 0))[1] != self._port:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._hosts and host_of(headers.get("host", "")) not in self._hosts:
            response: Response = PlainTextResponse("unknown host\n", 400)
        elif scope["path"] != PATH or scope["method"] not in ("GET", "HEAD"):
            response = PlainTextResponse("only GET /metrics\n", 404)
        else:
            response = await self._page.render(headers.get("accept", ""))
        await response(scope, receive, send)
