"""Reads LoRA files, which are merged into the weights while these are loaded. Imports torch.

Files whose tensors could not all be merged are refused: weight norms, differences, other text encoders.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from weights.errors import WrongWeights
from weights.formats.detect import detect_format
from weights.formats.headers import read_header
from weights.formats.lora_keys import PARTS, convert, is_peft
from weights.formats.tensors import Header

UNKNOWN = (
    ".dora_scale",
    ".lokr_",
    ".hada_",
    ".diff_b",
    ".set_weight",
    "text_encoders.t5xxl",
    "lora_te2_",
    "lora_te3_",
)
ADAPTER_METADATA = "lora_adapter_metadata"  # the entry in which diffusers stores peft's configuration
ADAPTER_FILE = "adapter_config.json"  # the file in which peft itself stores it


class Delta(NamedTuple):
    """What is added to a weight: `factor * up @ down`; `(out, rank)` and `(rank, in)`."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight `(out, in)`, in float32 on the weight's device."""
        product = self.up.to(weight.device).float() @ self.down.to(weight.device).float()
        return weight.float() + self.factor * product


@dataclass(frozen=True, slots=True)
class Lora:
    """What a file changes in the transformer and in the CLIP encoder, by the name of the weight without `.weight`."""

    path: Path
    transformer: Mapping[str, Delta]
    text_encoder: Mapping[str, Delta]


def read(path: Path, scale: float, tensor_shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """The LoRA of a file, with `scale` as a factor. `shapes` are the transformer's.

    Raises `WrongWeights` unless everything in the file can be merged.
    """
    header = read_header(path)
    if detect_format(header) != "lora":
        raise WrongWeights(path, "not a LoRA")
    if unknown := [name for name in header.tensors if any(mark in name for mark in UNKNOWN)]:
        raise WrongWeights(path, f"it holds {unknown[0]}: only plain LoRA on the transformer and on CLIP can be merged")
    tensors = load_file(path)
    adapter = read_adapter_file(path) if is_peft(tensors, tensor_shapes) else read_adapter(path, header)
    converted, alphas = convert(path, tensors, tensor_shapes)
    deltas = pair_matrices(path, converted, alphas, adapter, scale)
    parts = [{key.removeprefix(p): delta for key, delta in deltas.items() if key.startswith(p)} for p in PARTS]
    for name, delta in parts[0].items():
        if (expected := tensor_shapes.get(f"{name}.weight")) != (shape := (delta.up.shape[0], delta.down.shape[1])):
            there = f"is {list(expected)}" if expected else "is not part of the model"
            raise WrongWeights(path, f"it does not fit: it changes {name} as {list(shape)}, which {there}")
    return Lora(path, *parts)


def merge_into_text_encoder(lora: Lora, text_encoder: torch.nn.Module) -> None:
    """Add the part for the CLIP encoder to its weights, in place. Raises `WrongWeights` where it does not fit."""
    modules = dict(text_encoder.named_modules())
    for name, delta in lora.text_encoder.items():
        layer = modules.get(name) or modules.get(name.removeprefix("text_model."))
        shape = (delta.up.shape[0], delta.down.shape[1])
        if not isinstance(layer, torch.nn.Linear) or layer.weight.shape != shape:
            raise WrongWeights(lora.path, f"it does not fit: it changes the text encoder's {name} as {list(shape)}")
        with torch.no_grad():
            layer.weight.copy_(delta.add_to(layer.weight))


def read_adapter(path: Path, header: Header) -> dict[str, Any]:
    """The configuration of peft in a file's metadata, each entry behind its part's name. Raises `WrongWeights`."""
    try:
        return dict(json.loads(header.metadata.get(ADAPTER_METADATA, "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise WrongWeights(path, f"its {ADAPTER_METADATA} is damaged ({error})") from error


def read_adapter_file(path: Path) -> dict[str, Any]:
    """The configuration that peft saves beside a file, as `read_adapter` returns it. Raises `WrongWeights`.

    Without it the strength is unknown: it is lora_alpha / r, and only r can be seen in the file.
    """
    file = path.with_name(ADAPTER_FILE)
    if not file.is_file():
        raise WrongWeights(path, f"peft keeps its lora_alpha in {ADAPTER_FILE}, which is to stand beside it")
    try:
        adapter = dict(json.loads(file.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise WrongWeights(file, f"damaged ({error})") from error
    if not isinstance(adapter.get("lora_alpha"), int | float):
        raise WrongWeights(file, "it has no number as lora_alpha")
    return {f"transformer.{name}": value for name, value in adapter.items()}


def pair_matrices(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    alphas: Mapping[str, torch.Tensor],
    adapter: Mapping[str, Any],
    scale: float,
) -> dict[str, Delta]:
    """The deltas from `X.lora_A.weight` and `X.lora_B.weight`. Raises `WrongWeights` for any other tensor."""
    deltas: dict[str, Delta] = {}
    for key, down in tensors.items():
        name, mark, _ = key.partition(".lora_A.")
        if not mark:
            if key.partition(".lora_B.")[0] + ".lora_A.weight" not in tensors:
                raise WrongWeights(path, f"it holds {key}, which is no part of a LoRA that can be merged")
            continue
        up = tensors.get(f"{name}.lora_B.weight")
        if up is None or down.ndim != 2 or up.ndim != 2:
            raise WrongWeights(path, f"{name} has no pair of matrices")
        alpha = alphas.get(f"{name}.alpha")
        rank = down.shape[0]
        factor = scale * (float(alpha) / rank if alpha is not None else adapter_scale(path, name, rank, adapter))
        deltas[name] = Delta(up, down, factor)
    if unused := sorted(alphas.keys() - {f"{name}.alpha" for name in deltas}):
        raise WrongWeights(path, f"it holds {unused[0]}, which is no layer's that it changes")
    if not deltas:
        raise WrongWeights(path, "it changes nothing: no LoRA was found in it")
    return deltas


def adapter_scale(path: Path, name: str, rank: int, adapter: Mapping[str, Any]) -> float:
    """alpha / rank from the peft configuration in the file; 1 where the file has none."""
    part, _, module = name.partition(".")
    if adapter.get(f"{part}.use_dora"):
        raise WrongWeights(path, "a DoRA: only plain LoRA can be merged")
    patterns = adapter.get(f"{part}.alpha_pattern") or {}
    try:  # as peft matches them: a regular expression for the whole name, or for its end behind a dot
        matching = [a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
    except re.error as error:
        raise WrongWeights(path, f"its alpha_pattern is no regular expression ({error})") from error
    alpha = next(iter(matching), adapter.get(f"{part}.lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (sqrt(rank) if adapter.get(f"{part}.use_rslora") else rank)
