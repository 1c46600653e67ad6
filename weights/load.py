"""From files (or code) to a diffusers FLUX pipeline on a device. Imports torch: only a worker calls it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import SafetensorError, safe_open

from weights import tiny
from weights.checkpoints import Located
from weights.errors import WrongWeights

Report = Callable[[str, float], None]


def load_pipeline(located: Located, dtype: torch.dtype, device: torch.device, report: Report) -> FluxPipeline:
    """The whole pipeline in `dtype` on `device`. Reads local files only; raises `WeightsError`."""
    if located.folder is None:
        report("building the model", 0.5)
        return tiny.build(dtype).to(device)
    parts: dict[str, Any] = {}
    if located.transformer is not None:
        parts["transformer"] = load_transformer(located.folder, located.transformer, dtype, device, report)
    report("loading text encoders and VAE", 0.8)
    pipeline: FluxPipeline = FluxPipeline.from_pretrained(
        located.folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts
    )
    report("moving to the device", 0.95)
    return pipeline.to(device)


def load_transformer(
    folder: Path, file: Path, dtype: torch.dtype, device: torch.device, report: Report
) -> FluxTransformer2DModel:
    """A single-file transformer in diffusers keys (as Tencent publishes SRPO), shaped by the folder's own config.

    Tensor by tensor from the memory-mapped file to the device: the host never holds the fp32 file as a whole.
    """
    config = FluxTransformer2DModel.load_config(folder / "transformer", local_files_only=True)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as source:
            check_names(file, set(source.keys()), set(shapes))
            for done, (name, shape) in enumerate(shapes.items()):
                tensor = source.get_tensor(name)
                if tensor.shape != shape:
                    raise WrongWeights(file, f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
                tensors[name] = tensor.to(device=device, dtype=dtype)
                if done % 32 == 0:
                    report("loading the transformer", 0.8 * done / len(shapes))
    except SafetensorError as error:
        raise WrongWeights(file, f"not a readable safetensors file ({error})") from error
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def check_names(file: Path, found: set[str], expected: set[str]) -> None:
    """Raises `WrongWeights` unless the file holds exactly the architecture's tensors."""
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        raise WrongWeights(
            file,
            f"{len(missing)} tensors are missing{_first(missing)} and {len(surplus)} are not part of the model"
            f"{_first(surplus)}",
        )


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""
