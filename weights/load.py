"""From files (or code) to a diffusers FLUX pipeline on a device. Imports torch: only a worker calls it."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import SafetensorError

from weights import tiny
from weights.checkpoints import Located
from weights.errors import WrongWeights
from weights.formats import fp8_linear as float8
from weights.formats import lora
from weights.formats.architecture import Geometry, shapes
from weights.formats.detect import check, match
from weights.formats.headers import read_header
from weights.formats.read import Source
from weights.formats.snapshot import check_snapshot
from weights.lora_file import parse_lora

Report = Callable[[str, float], None]
HOST = torch.device("cpu")
MODULES = ("transformer", "text_encoder", "text_encoder_2", "vae")


def load_pipeline(
    located: Located,
    dtype: torch.dtype,
    device: torch.device,
    report: Report,
    loras: Sequence[str] = (),
    narrow: bool = False,
    waiting: Collection[str] = (),
) -> FluxPipeline:
    """The whole pipeline in `dtype` on `device`. Reads local files only.

    Raises `WeightsError`, and `ValueError` for one of the `loras` that is neither `FILE` nor `FILE:SCALE`.

    The transformer is in any of `FORMATS`; `loras` are added to it, each `FILE` or `FILE:SCALE`. `narrow` keeps its
    blocks' weights in float8. The `waiting` parts stay in the host's memory.
    """
    parts: dict[str, Any] = {}
    if located.folder is None:
        report("building the model", 0.5)
        pipeline = tiny.build(dtype)
        config = dict(pipeline.transformer.config)
        file = located.transformer
    else:
        check_snapshot(located.folder)
        config = json.loads((located.folder / "transformer" / "config.json").read_text())
        file = located.transformer or located.folder / "transformer"
    geometry = Geometry.from_config(config)
    added = [lora.read(*parse_lora(text), shapes(geometry)) for text in loras]
    home = HOST if "transformer" in waiting else device
    if file is not None:
        found = match(read_header(file), geometry)
        check(file, found)
        with Source(found) as source:
            parts["transformer"] = assemble(config, source.read, added, dtype, device, home, report, narrow)
    elif added or narrow:
        own = pipeline.transformer.state_dict()
        parts["transformer"] = assemble(config, own.__getitem__, added, dtype, device, home, report, narrow)
    if located.folder is None:
        pipeline.register_modules(**parts)
    else:
        report("loading text encoders and VAE", 0.8)
        pipeline = read_folder(located.folder, dtype, parts)
    for one in added:
        lora.merge(one, pipeline.text_encoder)
    report("moving to the device", 0.95)
    for name in MODULES:
        if name not in waiting:
            getattr(pipeline, name).to(device)
    return pipeline


def read_folder(folder: Path, dtype: torch.dtype, parts: Mapping[str, Any]) -> FluxPipeline:
    """A folder in diffusers layout; `parts` take the place of its own."""
    try:
        return FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts)
    except SafetensorError as error:
        raise WrongWeights(folder, f"a file of the text encoders or the VAE is damaged ({error})") from error


def assemble(
    config: Mapping[str, Any],
    read: Callable[[str], torch.Tensor],
    loras: Sequence[lora.Lora],
    dtype: torch.dtype,
    device: torch.device,
    home: torch.device,
    report: Report,
    narrow: bool,
) -> FluxTransformer2DModel:
    """A transformer from its tensors, one by one over the device to its home: no file is ever in memory as a whole.

    LoRAs are added in float32, before the weights are rounded to `dtype`, or to float8 where `narrow` says so.
    """
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
        if narrow:
            float8.narrow(model)
    tensors: dict[str, torch.Tensor] = {}
    wanted = shapes(Geometry.from_config(config))
    for done, name in enumerate(wanted):
        values = read(name).to(device)
        for one in loras:
            if (delta := one.transformer.get(name.removesuffix(".weight"))) and name.endswith(".weight"):
                values = delta.added_to(values)
        made = float8.stored(name, values, dtype) if narrow else {name: values.to(dtype)}
        tensors |= {key: value.to(home) for key, value in made.items()}
        if done % 32 == 0:
            report("loading the transformer", 0.8 * done / len(wanted))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)
