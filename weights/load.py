"""From files (or code) to a diffusers FLUX pipeline on a device. Imports torch: only a worker calls it."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import SafetensorError

from weights import lora, tiny
from weights.architecture import Geometry, shapes
from weights.checkpoints import Located
from weights.errors import WrongWeights
from weights.formats import check, match
from weights.headers import read_header
from weights.reading import Source
from weights.snapshot import check_snapshot

Report = Callable[[str, float], None]


def load_pipeline(
    located: Located,
    dtype: torch.dtype,
    device: torch.device,
    report: Report,
    transformer: Path | None = None,
    loras: Sequence[str] = (),
) -> FluxPipeline:
    """The whole pipeline in `dtype` on `device`. Reads local files only; raises `WeightsError`.

    `transformer` is a file or folder in any of `FORMATS` that takes the place of the row's own; `loras` are added to
    it, each `FILE` or `FILE:SCALE`.
    """
    parts: dict[str, Any] = {}
    if located.folder is None:
        report("building the model", 0.5)
        pipeline = tiny.build(dtype)
        config = dict(pipeline.transformer.config)
        file = transformer
    else:
        check_snapshot(located.folder)
        config = json.loads((located.folder / "transformer" / "config.json").read_text())
        file = transformer or located.transformer or located.folder / "transformer"
    geometry = Geometry.from_config(config)
    added = [lora.read(*lora.parse(text), shapes(geometry)) for text in loras]
    if file is not None:
        found = match(read_header(file), geometry)
        check(file, found)
        with Source(found) as source:
            parts["transformer"] = assemble(config, source.read, added, dtype, device, report)
    elif added:
        own = pipeline.transformer.state_dict()
        parts["transformer"] = assemble(config, own.__getitem__, added, dtype, device, report)
    if located.folder is None:
        pipeline.register_modules(**parts)
    else:
        report("loading text encoders and VAE", 0.8)
        pipeline = read_folder(located.folder, dtype, parts)
    for one in added:
        lora.merge(one, pipeline.text_encoder)
    report("moving to the device", 0.95)
    return pipeline.to(device)


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
    report: Report,
) -> FluxTransformer2DModel:
    """A transformer from its tensors, one by one to the device: the host never holds more than one of them.

    LoRAs are added in float32, before the weights are rounded to `dtype`.
    """
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    tensors: dict[str, torch.Tensor] = {}
    wanted = shapes(Geometry.from_config(config))
    for done, name in enumerate(wanted):
        values = read(name).to(device)
        for one in loras:
            if (delta := one.transformer.get(name.removesuffix(".weight"))) and name.endswith(".weight"):
                values = delta.added_to(values)
        tensors[name] = values.to(dtype)
        if done % 32 == 0:
            report("loading the transformer", 0.8 * done / len(wanted))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)
