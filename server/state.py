"""What the routes work with: one value, built complete from the settings by `create_app`."""

from dataclasses import dataclass, replace
from typing import Annotated, Self

from fastapi import Depends
from starlette.requests import Request

from pipelines.engine.base import EngineConfig
from pipelines.safety.guard import Guard
from pipelines.safety.prompts import PromptGuard
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.database.database import Database, resolve_url
from server.engine_setup import (
    build_engine_config,
    build_guard,
    build_patience,
    build_prompt_guard,
    build_signer,
)
from server.images.constant import ConstantImages
from server.images.signing import FileSigner
from server.images.source import Sources
from server.images.stores.base import Store
from server.images.stores.table import open_store
from server.logs import log_format_of
from server.metrics.recorder import Metrics
from server.process.data_folder import FolderClock
from server.process.threads import ThreadPools
from server.security.callers import Quota
from server.security.keys import KeyRing
from server.security.limits import FailedKeys, KeyLimits, UploadBudget
from server.security.origins import OriginPolicy
from server.security.rates import RequestRates
from server.security.service import KeyService
from server.security.store import KeyStore
from server.settings.server import Settings
from server.tracing.opening import open_traces
from server.tracing.traces import Traces
from server.translation.model_names import Dialect
from server.usage.ledger import UsageLedger
from server.usage.writer import UsageWriter
from weights.checkpoints import HOSTED_MODEL


@dataclass(frozen=True, slots=True)
class AppState:
    """The parts of one app."""

    settings: Settings
    pool: WorkerPool
    threads: ThreadPools
    metrics: Metrics
    traces: Traces
    uploads: UploadBudget
    limits: KeyLimits
    failed_keys: FailedKeys
    clock: FolderClock
    database: Database
    store: Store
    keys: KeyRing
    key_service: KeyService
    usage: UsageWriter
    guard: Guard
    prompts: PromptGuard
    constant: ConstantImages
    signer: FileSigner | None
    origins: OriginPolicy
    sources: Sources
    served: str  # id of the row in weights.checkpoints that the workers load
    dialect: Dialect

    @property
    def fingerprint(self) -> str | None:
        """The engine's, once a worker has loaded."""
        info = self.pool.status().info
        return info.fingerprint if info else None

    @classmethod
    def from_settings(cls, settings: Settings, pool: WorkerPool | None = None, guard: Guard | None = None) -> Self:
        """All parts, loaded and tested. A `pool` or `guard` that is given is used as it is.

        Raises `SafetyUnavailable` if the safety checker cannot be loaded or fails its self-test; `OSError` or
        `ValueError` if the prompt list, the key file or the signing certificate cannot be used, or if an alias names
        a model that is not served.
        """
        engine = build_engine_config(settings, settings.data_dir)
        threads = ThreadPools()
        pool = pool or build_pool(settings, engine)
        pool.observer = metrics = Metrics()
        clock = FolderClock(settings.data_dir)
        database = Database(resolve_url(settings.database_url, settings.data_dir), clock)
        keys = KeyRing(settings.api_keys, settings.api_keys_file, required=settings.require_key)
        quota = Quota(settings.key_images, settings.key_requests, settings.key_rate)
        return cls(
            settings=settings,
            threads=threads,
            metrics=metrics,
            traces=open_traces(settings.traces),
            uploads=UploadBudget(settings.uploads),
            pool=pool,
            limits=KeyLimits(quota, pool, RequestRates(database), threads),
            failed_keys=FailedKeys(settings.key_delay),
            constant=ConstantImages(settings.constant_images == "error"),
            signer=build_signer(settings),
            origins=OriginPolicy(settings, lambda: keys.needed),
            clock=clock,
            database=database,
            store=open_store(settings, clock),
            keys=keys,
            key_service=KeyService(keys, KeyStore(database), threads),
            usage=UsageWriter(UsageLedger(database), threads),
            guard=guard or build_guard(settings),
            prompts=build_prompt_guard(settings),
            sources=Sources(threads, may_fetch=not settings.no_fetch, memory=settings.source_memory),
            served=engine.model,
            dialect=build_dialect(settings, engine.model),
        )


async def get_app_state(request: Request) -> AppState:
    """The state of the app that the request came to."""
    state: AppState = request.app.parts
    return state


State = Annotated[AppState, Depends(get_app_state)]


def build_dialect(settings: Settings, served: str) -> Dialect:
    """How requests are read that leave something open. Raises `ValueError` if an alias names another model."""
    aliases = dict(text.split("=", 1) for text in settings.model_aliases)
    for name, model in aliases.items():
        if model not in (HOSTED_MODEL, served):
            raise ValueError(f"SRPO_MODEL_ALIASES: {name} stands for {model}, but {served} is loaded")
    return Dialect(served, settings.response_format, aliases)


def build_pool(settings: Settings, engine: EngineConfig) -> WorkerPool:
    """The workers, not started."""
    return WorkerPool(
        local_workers(replace(engine, log_format=log_format_of(settings)), settings.devices, build_patience(settings)),
        queue_size=settings.queue_size,
        max_running=settings.max_running,
        request_timeout=settings.request_timeout,
        idle_release=settings.idle_release,
    )
