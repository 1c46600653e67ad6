"""From a configuration to an engine that is known to work: what a worker does before it is ready."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline

from pipelines.engine.base import Engine, EngineConfig, EngineInfo, Report
from pipelines.engine.flux import FluxEngine
from pipelines.engine.sample import Sample
from pipelines.fields import Size
from pipelines.loading.context_parallel import Meet, load_group, world
from pipelines.loading.fingerprint import fingerprint, with_choices
from pipelines.loading.golden import check_itself
from pipelines.loading.offload import stream
from pipelines.loading.placement import Card, Placement, holders, host_memory, place, placement_of
from pipelines.optimize.apply import AppliedOptimizations, apply_optimizations
from pipelines.optimize.batching import exact_batches
from pipelines.optimize.compile import COMPILED, freeze, keep_in
from pipelines.optimize.optimizations import chosen, described, moving_bits
from pipelines.optimize.tuning_cache import TuningCache
from weights.checkpoints import CHECKPOINTS, Checkpoint, locate_files
from weights.load import load_pipeline


def load_engine(config: EngineConfig, report: Report) -> Engine[Sample]:
    """Build the engine a worker serves. Raises `WeightsError` where files are missing or wrong, `SelfCheckFailed`,
    `DoesNotFit` where the card has too little memory, `OptimizationFailed`, `NotTogether`."""
    return load_group(config, report, load_one) if "+" in config.device else load_one(config, report)


def load_one(config: EngineConfig, report: Report, meet: Meet | None = None) -> FluxEngine:
    """The engine of one process, on one device; it may `meet` others to draw together."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()  # their warnings quote the prompt
        library.disable_progress_bar()
        library.disable_default_handler()  # `pipelines.logs` has the format
        library.enable_propagation()
    report("reading the weights", 0.05)
    device = torch.device(choose_device(config.device))
    dtype = choose_dtype(config.dtype, device)
    given = Path(config.transformer) if config.transformer else None
    located = locate_files(CHECKPOINTS[config.model], Path(config.models_dir), given)
    row = located.checkpoint
    placement = placed(row, device, dtype, config.placement)
    report(f"placing ({placement})", 0.06)
    narrow, waiting = placement.way.float8, placement.way.streamed
    pipeline = load_pipeline(located, dtype, device, report, config.loras, narrow, waiting)
    if meet is not None:
        meet(pipeline.transformer, row.text_tokens, placement)
    # The fingerprint knows how the weights are stored; where they wait moves no bit.
    report("reading all weights for the fingerprint", 0.955)
    info = describe(row.id, pipeline, device, dtype)
    info = replace(info, dtype=placement.weights, placement=str(placement))
    stream(pipeline, waiting, device)
    engine = FluxEngine(pipeline, row.text_tokens, info, row.preview, row.guidance, row.canvas)
    engine.tile_above, engine.remarks = config.tile_above, placement.notes
    cache = TuningCache(Path(config.tuning_cache)) if config.tuning_cache is not None else None
    # A transformer whose layers come and go, or that others compute too, cannot be compiled: only what is exact.
    kind = "cpu" if "transformer" in waiting or world() > 1 else device.type
    applied = make_fast(engine, kind, config, cache, report)
    if cache is not None:
        settle(engine, cache, config, report)
    if not applied.choices.keys().isdisjoint(COMPILED):
        freeze()
    if cache is not None:
        report("checking itself", 0.98)
        check_itself(engine, cache)
    return engine


def make_fast(
    engine: FluxEngine, kind: str, config: EngineConfig, cache: TuningCache | None, report: Report
) -> AppliedOptimizations:
    """Pull the levers, by default those of a `kind` of device; what they find out is found out once."""
    report("making it fast", 0.95)
    base = engine.info.fingerprint
    if config.compile_cache is not None:
        keep_in(Path(config.compile_cache))
    if cache is not None:
        engine.remember = lambda section, find: str(cache.remember(section, base, find))
    wanted = chosen(config.optimizations, kind)
    applied = apply_optimizations(engine, wanted, set(wanted) - set(config.optimizations), cache, report)
    moving = moving_bits(applied.choices)
    moved = with_choices(base, {"levers": moving}) if moving else base
    engine.info = replace(engine.info, fingerprint=moved, optimizations=described(applied.choices, applied.failed))
    return applied


def settle(engine: FluxEngine, cache: TuningCache, config: EngineConfig, report: Report) -> None:
    """Make the other choices that this device, software and weights leave open, or take those made before."""
    report("trying which sizes can be batched", 0.96)
    base = engine.info.fingerprint
    batches = {
        size: tuple(cache.remember("batches", f"{base} {name}", lambda size=size: exact_batches(engine, size)))  # type: ignore[misc]
        for name, size in ((name, Size(*map(int, name.split("x")))) for name in config.batch_sizes)
    }
    engine.batches = batches
    choices = {"batches": sorted(batches.items()), "tile_above": config.tile_above}
    engine.info = replace(engine.info, fingerprint=with_choices(base, choices))


def choose_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def placed(row: Checkpoint, device: torch.device, dtype: torch.dtype, wanted: str) -> Placement:
    """Raises `DoesNotFit`."""
    precision = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return placement_of(row, precision, wanted)
    free, total = torch.cuda.mem_get_info(device)
    card = Card(torch.cuda.get_device_name(device), total, free)
    return place(row, precision, card, holders(), wanted, host_memory())


def describe(model: str, pipeline: FluxPipeline, device: torch.device, dtype: torch.dtype) -> EngineInfo:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    name += f", {world()} together" if world() > 1 else ""
    precision = str(dtype).removeprefix("torch.")
    parts: dict[str, Any] = {
        key: getattr(pipeline, key) for key in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    return EngineInfo(model, name, precision, fingerprint(name, precision, parts, device))
