"""create_app: the whole server as a value built from values.

Nothing here is global: two apps in one process do not know of each other. Importing this module never imports torch.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match

from pipelines.safety.guard import Guard
from pipelines.workers.pool import WorkerPool
from server.api import jobs as job_routes
from server.api.images import router
from server.api.middleware import RequestMiddleware
from server.api.openapi import SECURITY, bodies, form
from server.errors import MethodNotAllowed, NotFound
from server.jobs.service import JobService
from server.jobs.store import FILE, JobStore
from server.playground.routes import router as pages
from server.settings import Settings
from server.state import AppState
from weights.checkpoints import HOSTED_MODEL

METHODS = ("GET", "HEAD", "POST", "DELETE")
TITLE = "srpo: a self-hosted FLUX image server"


def create_app(settings: Settings, pool: WorkerPool | None = None, guard: Guard | None = None) -> FastAPI:
    """The server as an ASGI app. A `pool` or `guard` that is given is used as it is; the app starts and stops the pool.

    Raises `SafetyUnavailable` if the safety checker cannot be loaded or fails its self-test; `OSError` or `ValueError`
    if the prompt list or the signing certificate cannot be used.
    """
    state = AppState.from_settings(settings, pool, guard)
    jobs = JobService(state, JobStore(settings.data_dir / FILE))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.pool.start()
        await jobs.start()
        yield
        await state.pool.stop()
        await jobs.stop()

    app = FastAPI(
        title=TITLE,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: from_framework},
    )
    app.state.app_state = state
    app.state.jobs = jobs
    app.include_router(router)
    app.include_router(job_routes.router)
    app.include_router(pages)
    served = {} if state.served == HOSTED_MODEL else {"x-served-model": state.served}
    app.add_middleware(RequestMiddleware, origins=state.origins, headers=served)
    app.openapi = lambda: openapi(app, state.served)  # type: ignore[method-assign]
    return app


def openapi(app: FastAPI, served: str) -> dict[str, Any]:
    """The OpenAPI document: the loaded model's bounds, and the bearer scheme the routes refer to."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=TITLE, version=app.version, routes=app.routes)
        app.openapi_schema["components"]["securitySchemes"] = SECURITY
        for route, kind, schema in (
            ("generations", "application/json", bodies(served)),
            ("edits", "multipart/form-data", form(served)),
        ):
            asked = app.openapi_schema["paths"][f"/v1/images/{route}"]["post"]["requestBody"]
            asked["content"][kind]["schema"] = schema
    return app.openapi_schema


async def from_framework(request: Request, error: Exception) -> NoReturn:
    """Starlette's own 404 and 405, in our words; the edge turns them into the envelope."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        raise MethodNotAllowed(request.method, ", ".join(allowed(request)))
    raise NotFound


def allowed(request: Request) -> list[str]:
    """The methods of a path. Starlette's own answer names those of its first route only."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    routes = request.app.routes
    return [name for name, scope in scopes.items() if any(route.matches(scope)[0] is Match.FULL for route in routes)]
