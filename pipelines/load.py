"""From a configuration to an engine: what a worker does before it is ready."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FluxPipeline

from pipelines.engine import EngineConfig, EngineInfo, Report
from pipelines.fingerprint import fingerprint
from pipelines.flux import FluxEngine
from weights.checkpoints import CHECKPOINTS, locate
from weights.load import load_pipeline


def load_engine(config: EngineConfig, report: Report) -> FluxEngine:
    """Build the engine a worker serves. Raises `WeightsError` where files are missing or wrong."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()  # their warnings quote the prompt
        library.disable_progress_bar()
    report("reading the weights", 0.05)
    device = torch.device(choose_device(config.device))
    dtype = choose_dtype(config.dtype, device)
    located = locate(CHECKPOINTS[config.model], Path(config.models_dir))
    pipeline = load_pipeline(located, dtype, device, report)
    info = describe(located.checkpoint.id, pipeline, device, dtype)
    return FluxEngine(pipeline, located.checkpoint.text_tokens, info, located.checkpoint.preview)


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
