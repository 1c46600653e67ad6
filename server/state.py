"""What the routes work with: one value, built complete from the settings by `create_app`.

The builders of its parts stand beside it, because `srpo generate` and `srpo doctor` need them without a server.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

from fastapi import Depends
from starlette.requests import Request

from pipelines.engine.base import EngineConfig
from pipelines.optimize import tuning_cache
from pipelines.safety.guard import Guard, make_guard
from pipelines.safety.prompts import PromptGuard, make_prompt_guard
from pipelines.workers.patience import Patience
from pipelines.workers.pool import WorkerPool
from server.aliases import Dialect
from server.database.database import Database, resolve_url
from server.images.constant import ConstantImages
from server.images.signing import FileSigner, load_signer
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
from server.settings.engine import EngineSettings
from server.settings.server import Settings
from server.tracing.opening import open_traces
from server.tracing.traces import Traces
from server.usage.ledger import UsageLedger
from server.usage.writer import UsageWriter
from weights.checkpoints import HOSTED_MODEL, choose_checkpoint


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
    state: AppState = request.app.state.app_state
    return state


State = Annotated[AppState, Depends(get_app_state)]


def build_engine_config(settings: EngineSettings, data_dir: Path | None = None) -> EngineConfig:
    """What a worker loads, and how. With a `data_dir` measurements and compiled kernels are kept there."""
    row = choose_checkpoint(settings.model, settings.models_dir)
    config = EngineConfig(
        row.id,
        str(settings.models_dir.absolute()),
        settings.devices[0],
        settings.dtype,
        batch_sizes=settings.batch_sizes,
        tile_above=settings.tile_above,
        transformer=str(settings.transformer.absolute()) if settings.transformer else None,
        loras=settings.lora,
        verify_weights=settings.verify_weights,
        placement=settings.placement,
        optimizations=settings.optimizations,
        processes=settings.processes,
        compile_cache=str(settings.compile_cache.absolute()) if settings.compile_cache else None,
    )
    if data_dir is None:
        return config
    data = data_dir.absolute()
    compiled = config.compile_cache or str(data / "compiled")
    return replace(config, tuning_cache=str(data / tuning_cache.NAME), compile_cache=compiled)


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
        replace(engine, log_format=log_format_of(settings)),
        devices=settings.devices,
        queue_size=settings.queue_size,
        max_running=settings.max_running,
        request_timeout=settings.request_timeout,
        patience=build_patience(settings),
        idle_release=settings.idle_release,
    )


def build_patience(settings: EngineSettings) -> Patience:
    return Patience(settings.worker_timeout, settings.step_timeout)


def build_guard(settings: EngineSettings) -> Guard:
    """The safety checker with the operator's policy, loaded and tested. Raises `SafetyUnavailable`."""
    policy = (settings.safety_threshold, settings.safety_policy, settings.safety_action)
    return make_guard(
        settings.safety_checker, *policy, settings.safety_labels, settings.safety_device, settings.safety_timeout
    )


def build_prompt_guard(settings: EngineSettings) -> PromptGuard:
    """The operator's rules for prompts. Raises `OSError` or `ValueError`."""
    return make_prompt_guard(settings.prompt_list, settings.prompt_hook, settings.safety_timeout)


def build_signer(settings: EngineSettings) -> FileSigner | None:
    """What signs image files, where there is a certificate. Raises `OSError` or `ValueError` if it does not work."""
    if settings.c2pa_certificate is None or settings.c2pa_key is None:
        return None
    return load_signer(settings.c2pa_certificate, settings.c2pa_key, settings.c2pa_algorithm)
