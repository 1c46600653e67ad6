"""Loads a diffusers FLUX pipeline onto a device, from local files or from code. Imports torch: only a worker calls it.

Every file is checked before it is read, and no file is ever in memory as a whole.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import SafetensorError

from weights import tiny
from weights.checkpoints import CheckpointFiles
from weights.errors import WrongWeights
from weights.formats import lora
from weights.formats.architecture import TransformerConfig, tensor_shapes
from weights.formats.detect import match_tensors, require_match
from weights.formats.fp8_linear import float8_state, use_float8_linears
from weights.formats.headers import read_header
from weights.formats.read import TensorReader
from weights.formats.snapshot import check_snapshot
from weights.lora_file import parse_lora

Report = Callable[[str, float], None]
HOST = torch.device("cpu")
MODULES = ("transformer", "text_encoder", "text_encoder_2", "vae")


def load_pipeline(
    located: CheckpointFiles,
    dtype: torch.dtype,
    device: torch.device,
    report: Report,
    loras: Sequence[str] = (),
    fp8: bool = False,
    on_host: Collection[str] = (),
) -> FluxPipeline:
    """The whole pipeline in `dtype` on `device`. Reads local files only.

    The transformer may have any of `FORMATS`. `loras`, each `FILE` or `FILE:SCALE`, are merged into it. With `fp8` the
    weights of its blocks are stored in float8. The parts named in `on_host` stay in the host's memory.

    Raises `WeightsError`, and `ValueError` for one of the `loras` that is neither `FILE` nor `FILE:SCALE`.
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
    transformer_config = TransformerConfig.from_config(config)
    adapters = [lora.read(*parse_lora(text), tensor_shapes(transformer_config)) for text in loras]
    home = HOST if "transformer" in on_host else device
    if file is not None:
        with open_tensors(file, transformer_config, device) as tensors:
            parts["transformer"] = build_transformer(config, tensors, adapters, dtype, device, home, report, fp8)
    elif adapters or fp8:
        state = pipeline.transformer.state_dict()
        parts["transformer"] = build_transformer(config, state.items(), adapters, dtype, device, home, report, fp8)
    if located.folder is None:
        pipeline.register_modules(**parts)
    else:
        report("loading text encoders and VAE", 0.8)
        pipeline = load_folder(located.folder, dtype, parts)
    for adapter in adapters:
        lora.merge_into_text_encoder(adapter, pipeline.text_encoder)
    report("moving to the device", 0.95)
    for name in MODULES:
        if name not in on_host:
            getattr(pipeline, name).to(device)
    return pipeline


@contextmanager
def open_tensors(
    file: Path, config: TransformerConfig, device: torch.device
) -> Iterator[Iterable[tuple[str, torch.Tensor]]]:
    """The transformer's names and tensors in a file of any format, on `device`, each valid until the next.

    Raises `WeightsError`.
    """
    match = match_tensors(read_header(file), config)
    require_match(file, match)
    pinned = device.type == "cuda"
    with (
        TensorReader(match) as reader,
        closing(reader.read_all(tensor_shapes(config), pinned=pinned, device=device)) as tensors,
    ):
        yield tensors


def load_folder(folder: Path, dtype: torch.dtype, parts: Mapping[str, Any]) -> FluxPipeline:
    """The pipeline in a folder of diffusers layout, with `parts` instead of its own. Raises `WrongWeights`."""
    try:
        return FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **parts)
    except SafetensorError as error:
        raise WrongWeights(folder, f"a file of the text encoders or the VAE is damaged ({error})") from error


def build_transformer(
    config: Mapping[str, Any],
    stored: Iterable[tuple[str, torch.Tensor]],
    loras: Sequence[lora.Lora],
    dtype: torch.dtype,
    device: torch.device,
    home: torch.device,
    report: Report,
    fp8: bool,
) -> FluxTransformer2DModel:
    """A transformer of `stored` names and tensors, taken one by one, converted on `device` and stored on `home`.

    It shares no memory with them: each is only valid until the next one is taken.
    LoRAs are added in float32, before the weights are rounded to `dtype`, or to float8 with `fp8`.
    """
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
        if fp8:
            use_float8_linears(model)
    tensors: dict[str, torch.Tensor] = {}
    total = len(tensor_shapes(TransformerConfig.from_config(config)))
    for done, (name, read) in enumerate(stored):
        values = read.to(device)
        for adapter in loras:
            if (delta := adapter.transformer.get(name.removesuffix(".weight"))) and name.endswith(".weight"):
                values = delta.add_to(values)
        state = float8_state(name, values, dtype) if fp8 else {name: values.to(dtype)}
        tensors |= {key: store(value, home, read) for key, value in state.items()}
        if done % 32 == 0:
            report("loading the transformer", 0.8 * done / total)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def store(value: torch.Tensor, home: torch.device, read: torch.Tensor) -> torch.Tensor:
    """The value on `home`, in memory of its own and not in that of `read`, if that is a buffer."""
    stored = value.to(home)
    in_buffer = read.device.type == "cpu" and stored.untyped_storage().data_ptr() == read.untyped_storage().data_ptr()
    return stored.clone() if in_buffer else stored
