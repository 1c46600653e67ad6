"""What draws, checks and signs, built from the settings: for a server, and for commands that draw without one."""

from dataclasses import replace
from pathlib import Path

from pipelines.engine.base import EngineConfig
from pipelines.optimize import tuning_cache
from pipelines.safety.guard import Guard, make_guard
from pipelines.safety.prompts import PromptGuard, make_prompt_guard
from pipelines.workers.patience import Patience
from server.images.signing import FileSigner, load_signer
from server.settings.engine import EngineSettings
from weights.checkpoints import choose_checkpoint


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
