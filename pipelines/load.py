"""From a configuration to an engine that is known to work: what a worker does before it is ready."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline

from pipelines.batches import exact_batches
from pipelines.engine import EngineConfig, EngineInfo, Report
from pipelines.fingerprint import fingerprint, with_choices
from pipelines.flux import FluxEngine
from pipelines.kept import Kept
from pipelines.kinds import Size
from pipelines.placement import Card, holders, place
from pipelines.selfcheck import check_itself
from weights.checkpoints import CHECKPOINTS, locate
from weights.load import load_pipeline


def load_engine(config: EngineConfig, report: Report) -> FluxEngine:
    """Build the engine a worker serves. Raises `WeightsError` where files are missing or wrong, `SelfCheckFailed`,
    `DoesNotFit` where the card has too little memory."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()  # their warnings quote the prompt
        library.disable_progress_bar()
    report("reading the weights", 0.05)
    device = torch.device(choose_device(config.device))
    dtype = choose_dtype(config.dtype, device)
    located = locate(CHECKPOINTS[config.model], Path(config.models_dir))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        card = Card(torch.cuda.get_device_name(device), total, free)
        report(f"placing: {place(located.checkpoint, str(dtype).removeprefix('torch.'), card, holders())}", 0.06)
    transformer = Path(config.transformer) if config.transformer else None
    pipeline = load_pipeline(located, dtype, device, report, transformer, config.loras)
    info = describe(located.checkpoint.id, pipeline, device, dtype)
    row = located.checkpoint
    engine = FluxEngine(pipeline, row.text_tokens, info, row.preview, row.guidance, row.canvas)
    engine.tile_above = config.tile_above
    if config.kept is not None:
        settle(engine, Kept(Path(config.kept)), config, report)
    return engine


def settle(engine: FluxEngine, kept: Kept, config: EngineConfig, report: Report) -> None:
    """Make the choices that this device, software and weights leave open, or take those made before; then check."""
    report("trying which sizes can be batched", 0.96)
    base = engine.info.fingerprint
    batches = {
        size: tuple(kept.once("batches", f"{base} {name}", lambda size=size: exact_batches(engine, size)))  # type: ignore[misc]
        for name, size in ((name, Size(*map(int, name.split("x")))) for name in config.batch_sizes)
    }
    engine.batches = batches
    choices = {"batches": sorted(batches.items()), "tile_above": config.tile_above}
    engine.info = replace(engine.info, fingerprint=with_choices(base, choices))
    report("checking itself", 0.98)
    check_itself(engine, kept)


def choose_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe(model: str, pipeline: FluxPipeline, device: torch.device, dtype: torch.dtype) -> EngineInfo:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    precision = str(dtype).removeprefix("torch.")
    parts: dict[str, Any] = {
        key: getattr(pipeline, key) for key in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    return EngineInfo(model, name, precision, fingerprint(name, precision, parts))
