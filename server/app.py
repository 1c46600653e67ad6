"""`ImageServer` is the whole server; `create_app` builds it from its settings.

Nothing here is global: two apps in one process share nothing. Importing this module never imports torch.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from pipelines.duties import keep_running
from pipelines.safety.guard import Guard
from pipelines.workers.pool import WorkerPool
from server.api import admin, files, health, images, jobs, metrics, models, workers
from server.api.metrics import MetricsPage, MetricsPort
from server.api.openapi import describe_bodies, drop_422
from server.errors import InvalidRequest, MethodNotAllowed, NotFound
from server.jobs.service import JobService
from server.jobs.store import JobStore
from server.playground import routes as pages
from server.process.loop_watch import LoopWatch
from server.schema import issues_of
from server.settings.server import Settings
from server.state import AppState
from server.transport.middleware import RequestMiddleware
from weights.checkpoints import HOSTED_MODEL

TITLE = "srpo: a self-hosted FLUX image server"
# FastAPI's own spans and logs of requests hold paths, queries and messages of errors, where prompts and signatures may
# be, and a variable of its own would send them off. Ours are in server.tracing.
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
METHODS = ("GET", "HEAD", "POST", "DELETE")  # in the order in which they are named
ROUTERS = tuple(module.router for module in (images, models, jobs, files, health, metrics, admin, workers, pages))


class ImageServer(FastAPI):
    """The app. Its OpenAPI document has the loaded model's bounds in the two bodies that routes read themselves."""

    def __init__(self, parts: AppState) -> None:
        settings = parts.settings
        super().__init__(
            title=TITLE,
            redirect_slashes=False,
            docs_url=None,
            redoc_url=None,
            lifespan=run_parts,
            telemetry=NO_TELEMETRY,
            openapi_url="/openapi.json" if settings.pages else None,
            exception_handlers={HTTPException: raise_framework_error, RequestValidationError: raise_invalid_request},
        )
        self.parts = parts
        self.jobs = JobService(parts, JobStore(parts.database, parts.usage.ledger))
        self.loop_watch = LoopWatch()
        page = MetricsPage(parts, self.jobs, self.loop_watch)
        self.metrics_page = page if settings.metrics and settings.metrics_port is None else None
        for router in ROUTERS:
            self.include_router(router)
        self.add_middleware(
            RequestMiddleware,
            origins=parts.origins,
            headers=served_headers(parts.served),
            metrics=parts.metrics,
            traces=parts.traces,
        )
        if settings.metrics and settings.metrics_port is not None:
            self.add_middleware(MetricsPort, page=page, host=settings.metrics_host, port=settings.metrics_port)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            describe_bodies(document, self.parts.served)
            drop_422(document)
        assert self.openapi_schema is not None
        return self.openapi_schema


@asynccontextmanager
async def run_parts(app: ImageServer) -> AsyncIterator[None]:
    """What runs as long as the app: started before it serves, and ended, in the order of who needs whom, after."""
    parts, watch = app.parts, app.loop_watch
    await parts.pool.start()
    await app.jobs.start()
    await parts.key_service.reload()
    duties = {"loop": watch.run, "keys": parts.key_service.run, "usage": parts.usage.run}
    watching = [asyncio.create_task(keep_running(name, duty)) for name, duty in duties.items()]
    watch.notify("READY=1")
    yield
    watch.notify("STOPPING=1")
    await app.jobs.finish()
    await parts.pool.stop()
    await parts.usage.stop()
    await app.jobs.stop()
    await parts.threads.run("traces", parts.traces.stop)
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    await parts.threads.run("database", parts.database.close)
    parts.threads.close()


def create_app(settings: Settings, pool: WorkerPool | None = None, guard: Guard | None = None) -> ImageServer:
    """The server as an ASGI app. A `pool` or `guard` that is given is used as it is; the app starts and stops the pool.

    Raises `SafetyUnavailable` if the safety checker cannot be loaded or fails its self-test; `OSError` or `ValueError`
    if the prompt list or the signing certificate cannot be used.
    """
    return ImageServer(AppState.from_settings(settings, pool, guard))


def served_headers(model: str) -> dict[str, str]:
    """What goes out with every reply: which model draws, where it is not the one that the hosted API serves."""
    return {} if model == HOSTED_MODEL else {"x-served-model": model}


def list_methods() -> dict[str, str]:
    """The methods of each path. Starlette's own answer to a wrong one names those of the path's first route only."""
    methods: dict[str, set[str]] = {}
    for route in (route for router in ROUTERS for route in router.routes if isinstance(route, Route)):
        methods.setdefault(route.path, set()).update(route.methods or ())
    return {path: ", ".join(name for name in METHODS if name in names) for path, names in methods.items()}


ALLOWED = list_methods()


async def raise_framework_error(request: Request, error: Exception) -> NoReturn:
    """Starlette's own 404 and 405 as ours; the middleware turns them into the envelope."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        route = request.scope.get("route")
        raise MethodNotAllowed(request.method, ALLOWED[route.path] if route else "GET, HEAD")
    if request.url.path.endswith(("/completions", "/responses")):  # a client that was set up for chat
        raise NotFound(
            "This server draws images, it does not chat: POST to /v1/images/generations, or a picture to begin with "
            "to /v1/images/edits."
        )
    raise NotFound


async def raise_invalid_request(_: Request, error: Exception) -> NoReturn:
    """What FastAPI refuses in a query, with the same words as a field of a body."""
    assert isinstance(error, RequestValidationError)
    details = [{**detail, "loc": detail["loc"][1:]} for detail in error.errors()]
    raise InvalidRequest([issue for detail in details for issue in issues_of(detail)])
