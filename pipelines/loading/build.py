"""From a configuration to an engine that is known to work: what a worker does before it is ready."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline

from pipelines.engine.base import Engine, EngineConfig, EngineInfo, Report
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.engine.sample import Sample
from pipelines.fields import Size
from pipelines.loading.cards import Card, list_holders
from pipelines.loading.context_parallel import JoinGroup, group_size, load_group
from pipelines.loading.devices import choose_device
from pipelines.loading.fingerprint import add_choices, compute_fingerprint
from pipelines.loading.golden import check_golden_images
from pipelines.loading.offload import stream_parts
from pipelines.loading.placement import Placement, choose_placement, get_placement, measure_host_memory
from pipelines.optimize.apply import AppliedOptimizations, OptimizationFailed, apply_optimizations
from pipelines.optimize.batching import COUNTS, find_exact_batches
from pipelines.optimize.compile import COMPILED, forbid_compilation, set_cache_folder, warm_up
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import describe_optimizations, select_inexact, select_optimizations
from pipelines.optimize.tuning_cache import TuningCache
from weights.checkpoints import CHECKPOINTS, Checkpoint, locate_files
from weights.hub.manifest import check_pulled
from weights.load import load_pipeline


def load_engine(config: EngineConfig, report: Report) -> Engine[Sample]:
    """Build the engine a worker serves. Raises `WeightsError` where files are missing or wrong, `SelfCheckFailed`,
    `DeviceRefused`, `DoesNotFit` where the card has too little memory, `OptimizationFailed`, `NotTogether`."""
    return load_group(config, report, load_one) if "+" in config.device else load_one(config, report)


def load_one(config: EngineConfig, report: Report, join_group: JoinGroup | None = None) -> FluxEngine:
    """The engine of one process, on one device. `join_group` makes it one of several that draw each image together."""
    silence_libraries()
    fix_convolutions()
    engine, restricted = build_plain_engine(config, report, join_group)
    cache = TuningCache(Path(config.tuning_cache)) if config.tuning_cache is not None else None
    kind = "cpu" if restricted else engine.device.type
    engine, applied = optimize_engine(engine, kind, config, cache, report)
    choose_convolutions(engine, applied, report)
    if cache is not None:
        engine = allow_exact_batches(engine, config, cache, report)
    if not applied.choices.keys().isdisjoint(COMPILED):
        forbid_compilation()
    if cache is not None:
        report("checking itself", 0.98)
        check_golden_images(engine, cache)
    return engine


def build_plain_engine(config: EngineConfig, report: Report, join_group: JoinGroup | None) -> tuple[FluxEngine, bool]:
    """The engine without optimizations; and whether its transformer is streamed, or shared with other processes: only
    what is exact can be applied to it. Raises `OptimizationFailed` where something else is wanted.
    """
    report("reading the weights", 0.05)
    transformer = Path(config.transformer) if config.transformer else None
    located = locate_files(CHECKPOINTS[config.model], Path(config.models_dir), transformer)
    check_pulled(located, config.verify_weights)
    checkpoint = located.checkpoint
    device = choose_device(config.device, checkpoint)
    dtype = choose_dtype(config.dtype, device)
    placement = place_on_device(checkpoint, device, dtype, config)
    restricted = join_group is not None or "transformer" in placement.spec.streamed
    if restricted and (unusable := select_inexact(select_optimizations(config.optimizations, "cpu"))):
        raise OptimizationFailed(
            unusable[0], "it needs a transformer that is whole on one device", config.optimizations
        )
    report(f"placing ({placement})", 0.06)
    streamed = placement.spec.streamed
    pipeline = load_pipeline(located, dtype, device, report, config.loras, placement.spec.float8, streamed)
    if join_group is not None:
        join_group(pipeline.transformer, checkpoint.text_tokens, placement)
    report("reading all weights for the fingerprint", 0.955)
    info = describe_engine(checkpoint.id, pipeline, device, dtype)
    info = replace(info, dtype=placement.weights, placement=str(placement), max_pixels=placement.max_pixels)
    stream_parts(pipeline, streamed, device)
    options = EngineOptions(
        info=info,
        text_tokens=checkpoint.text_tokens,
        preview=checkpoint.preview,
        guidance=checkpoint.guidance,
        canvas=checkpoint.canvas and Size(*checkpoint.canvas),
        words=checkpoint.words,
        tile_above=config.tile_above,
        remarks=placement.notes,
    )
    return FluxEngine(pipeline, options), restricted


def optimize_engine(
    engine: FluxEngine, kind: str, config: EngineConfig, cache: TuningCache | None, report: Report, compiler: Any = None
) -> tuple[FluxEngine, AppliedOptimizations]:
    """Apply the optimizations that the configuration names; `default` means those of a `kind` of device.

    Choices that change bits are part of the fingerprint, and are made once.
    """
    report("making it fast", 0.95)
    base = engine.info.fingerprint
    if config.compile_cache is not None:
        set_cache_folder(Path(config.compile_cache))
    context = OptimizationContext(compiler or "inductor", batch_sizes=read_sizes(config), report=report)
    if cache is not None:
        context = replace(context, remember=lambda section, measure: str(cache.remember(section, base, measure)))
    wanted = select_optimizations(config.optimizations, kind)
    optional = set(wanted) - set(config.optimizations)
    engine, applied = apply_optimizations(engine, wanted, optional, cache, context)
    inexact = {name: applied.choices[name] for name in select_inexact(applied.choices)}
    fingerprint = add_choices(base, {"optimizations": inexact}) if inexact else base
    described = describe_optimizations(applied.choices, applied.failed)
    return engine.change(info=replace(engine.info, fingerprint=fingerprint, optimizations=described)), applied


def allow_exact_batches(engine: FluxEngine, config: EngineConfig, cache: TuningCache, report: Report) -> FluxEngine:
    """The engine with batches of the configured sizes, as far as they are exact here; measured once.

    A compiled engine brings those that were compiled, and no other number of samples is tried.
    """
    base = engine.info.fingerprint
    batches = {}
    for size in read_sizes(config):
        candidates = engine.options.batches.get(size, COUNTS)
        find = partial(find_exact_batches, engine, size, candidates, report)
        exact = cache.remember("batches", f"{base} {size.width}x{size.height}", find)
        batches[size] = tuple(count for count in exact if count in candidates)
    choices = {"batches": sorted(batches.items()), "tile_above": config.tile_above}
    return engine.change(info=replace(engine.info, fingerprint=add_choices(base, choices)), batches=batches)


def choose_convolutions(engine: FluxEngine, applied: AppliedOptimizations, report: Report) -> None:
    """Let cuDNN choose algorithms for the decoder and the encoder at each usual size while memory is free.

    It keeps the first that could run in the process; where memory is short that is another one, which rounds otherwise.
    """
    if engine.device.type != "cuda":
        return
    if "compile_vae" not in applied.choices:  # whose warm-up has done it
        warm_up(engine, "decoding", report)
    warm_up(engine, "encoding", report)


def read_sizes(config: EngineConfig) -> tuple[Size, ...]:
    """The sizes to batch."""
    return tuple(Size(*map(int, name.split("x"))) for name in config.batch_sizes)


def silence_libraries() -> None:
    """Their warnings quote prompts."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
        library.disable_default_handler()  # `pipelines.logs` has the format
        library.enable_propagation()


def fix_convolutions() -> None:
    """Let cuDNN use deterministic algorithms only, and never choose one by timing: other bits under one fingerprint."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def place_on_device(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, config: EngineConfig
) -> Placement:
    """Where the model's parts go. Raises `DoesNotFit`."""
    precision = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return get_placement(checkpoint, precision, config.placement)
    free, total = torch.cuda.mem_get_info(device)
    card = Card(torch.cuda.get_device_name(device), total, free)
    how = list_holders(), config.placement, measure_host_memory(), config.processes, "fp8" in config.optimizations
    return choose_placement(checkpoint, precision, card, *how)


def describe_engine(model: str, pipeline: FluxPipeline, device: torch.device, dtype: torch.dtype) -> EngineInfo:
    """Reads all weights for the fingerprint, where they are stored: streaming them changes no bit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    name += f", {group_size()} together" if group_size() > 1 else ""
    precision = str(dtype).removeprefix("torch.")
    parts: dict[str, Any] = {
        key: getattr(pipeline, key) for key in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    fingerprint = compute_fingerprint(name, precision, parts, device)
    return EngineInfo(model, name, precision, fingerprint, device_type=device.type)
