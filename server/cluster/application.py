"""The application that Ray Serve runs: `Api` replicas, each of them the app of `srpo serve`, and `Engine` replicas.

Replicas read their settings from the environment of their node, so that no key or password goes through Ray.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from pipelines.engine.base import EngineInfo
from pipelines.workers.pool import WorkerPool
from pipelines.workers.protocol import known_fields
from server import logs
from server.app import ImageServer, create_app
from server.cluster.engine import EngineMessage, build_engine
from server.cluster.settings import ClusterSettings
from server.cluster.slots import CallLost, make_slots
from server.cluster.watchdog import keep_watched
from server.engine_setup import build_engine_config
from server.process.data_folder import make_private

NAME = "srpo"
ENGINE = "Engine"
DESCRIBE_LIMIT = 10.0  # seconds
STANDSTILL = 2.0  # of the time after which an engine counts as lost: then its process is killed
HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 10}


@contextmanager
def lost_calls() -> Iterator[None]:
    """Ray's errors as `CallLost`, by their class alone: their text may quote what was asked for."""
    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        raise CallLost(type(error).__name__) from None


class RayCall:
    """A streamed call of a handle."""

    def __init__(self, response: "DeploymentResponseGenerator[EngineMessage]") -> None:
        self._response = response

    async def messages(self) -> AsyncIterator[EngineMessage]:
        with lost_calls():
            async for message in self._response:
                yield message

    def cancel(self) -> None:
        self._response.cancel()


class RayEngines:
    """The engines behind a handle."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle
        self._threads = ThreadPoolExecutor(1, "controller")  # asking it blocks

    async def count_ready(self) -> int:
        loop = asyncio.get_running_loop()
        with lost_calls():
            status = await loop.run_in_executor(self._threads, serve.status)
        application = status.applications.get(NAME)
        engine = application.deployments.get(ENGINE) if application else None
        return int(engine.replica_states.get("RUNNING", 0)) if engine else 0

    async def describe(self) -> EngineInfo:
        with lost_calls():
            async with asyncio.timeout(DESCRIBE_LIMIT):
                return EngineInfo(**known_fields(EngineInfo, await self._handle.describe.remote()))

    def draw(
        self, request: dict[str, Any], pixels: bytes, previews: dict[str, int], fingerprint: str, tenant: str
    ) -> RayCall:
        return RayCall(self._handle.options(stream=True).draw.remote(request, pixels, previews, fingerprint, tenant))


class ApiReplica:
    """The app, with the cluster's engines instead of workers of its own."""

    def __init__(self, engine: "DeploymentHandle[Any]") -> None:
        self._engines = RayEngines(engine)

    def __serve_build_asgi_app__(self) -> ImageServer:
        self._folder = TemporaryDirectory(prefix="srpo-api-")  # truth is in the database and the bucket
        settings = ClusterSettings().model_copy(update={"data_dir": Path(self._folder.name)})
        make_private(settings.data_dir)
        logs.configure(settings)
        pool = WorkerPool(
            lambda callbacks: make_slots(self._engines, callbacks, settings.engines, settings.engine_timeout),
            queue_size=settings.queue_size,
            max_running=settings.max_running,
            request_timeout=settings.request_timeout,
        )
        return create_app(settings, pool)


def count_engines_here(settings: ClusterSettings) -> int:
    """How many engines this machine may have: they share its memory, where parts of a model wait for their turn."""
    here = ray.get_runtime_context().get_node_id()
    gpus = next((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["NodeID"] == here), 0.0)
    fitting = int(gpus / settings.engine_gpus) if settings.engine_gpus else settings.engines
    return max(1, min(settings.engines, fitting))


class EngineReplica:
    """One engine on the device that Ray gives it. Ready when its worker is."""

    async def __init__(self, factory: str | None) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = ClusterSettings()
        make_private(settings.data_dir)
        logs.configure(settings)
        config = build_engine_config(settings, settings.data_dir)
        processes = config.processes * count_engines_here(settings)
        config = replace(config, processes=processes, log_format=logs.log_format_of(settings))
        if factory is not None:
            config = replace(config, factory=factory)
        self._watched = asyncio.create_task(keep_watched(STANDSTILL * settings.engine_timeout))
        self._service = build_engine(settings, config)
        await self._service.load()

    async def describe(self) -> dict[str, Any]:
        return self._service.describe()

    async def draw(self, *arguments: Any) -> AsyncIterator[EngineMessage]:
        async for message in self._service.draw(*arguments):
            yield message

    async def check_health(self) -> None:
        self._service.check()


def build_application(settings: ClusterSettings, factory: str | None = None) -> serve.Application:
    """Both deployments. `factory` names another engine than the project's own."""
    grace = settings.request_timeout + 10.0
    engine = serve.deployment(EngineReplica).options(
        name=ENGINE,
        num_replicas=settings.engines,
        ray_actor_options={"num_cpus": 0, "num_gpus": settings.engine_gpus},
        max_ongoing_requests=settings.max_running,
        graceful_shutdown_timeout_s=grace,
        **HEALTH,
    )
    api = serve.deployment(serve.ingress()(ApiReplica)).options(
        name="Api",
        num_replicas=settings.apis,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_connections,
        max_surge_percent=100,  # new ones come before old ones go, as they need no device
        graceful_shutdown_timeout_s=grace,
        **HEALTH,
    )
    return api.bind(engine.bind(factory))


def build(args: dict[str, str]) -> serve.Application:
    """For `serve run`, `serve deploy` and RayService: settings come from the environment of the nodes."""
    return build_application(ClusterSettings(), args.get("factory"))
