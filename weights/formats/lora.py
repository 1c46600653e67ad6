"""LoRA files, merged into a transformer as it is loaded. Imports torch.

diffusers' own converters bring the keys of kohya, ComfyUI, XLabs and others to its own. What they would leave out
without a word (weight norms, differences, other text encoders) is an error here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from weights.errors import WrongWeights
from weights.formats.detect import format_of
from weights.formats.headers import read_header
from weights.formats.tensors import Header

LEFT_OUT = (".dora_scale", ".lokr_", ".hada_", ".diff", ".set_weight", "text_encoders.t5xxl", "lora_te2_", "lora_te3_")
PARTS = ("transformer.", "text_encoder.")
CLIP_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # diffusers' old names
ADAPTER = "lora_adapter_metadata"  # where diffusers and peft keep their configuration


class Delta(NamedTuple):
    """What is added to a weight: `factor * up @ down`; `(out, rank)` and `(rank, in)`."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """In float32, on the weight's device."""
        product = self.up.to(weight.device).float() @ self.down.to(weight.device).float()
        return weight.float() + self.factor * product


@dataclass(frozen=True, slots=True)
class Lora:
    """A file's deltas by the name of the weight, without `.weight`: the transformer's, and the CLIP encoder's."""

    path: Path
    transformer: Mapping[str, Delta]
    text_encoder: Mapping[str, Delta]


def read(path: Path, scale: float, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """Raises `WrongWeights` unless all of the file can be merged into a transformer of these shapes."""
    header = read_header(path)
    if format_of(header) != "lora":
        raise WrongWeights(path, "not a LoRA")
    if left := [name for name in header.tensors if any(mark in name for mark in LEFT_OUT)]:
        raise WrongWeights(path, f"it holds {left[0]}: only plain LoRA on the transformer and on CLIP can be merged")
    tensors = with_final_alpha({comfyui(name): tensor for name, tensor in load_file(path).items()})
    try:
        named, alphas = FluxPipeline.lora_state_dict(tensors, return_alphas=True)
    except (ValueError, KeyError, AssertionError, NotImplementedError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WrongWeights(path, f"diffusers' converter cannot take its keys ({reason})") from error
    deltas = pairs(path, {unified(name): tensor for name, tensor in named.items()}, alphas or {}, header, scale)
    parts = [{key.removeprefix(p): delta for key, delta in deltas.items() if key.startswith(p)} for p in PARTS]
    for name, delta in parts[0].items():
        if (expected := shapes.get(f"{name}.weight")) != (shape := (delta.up.shape[0], delta.down.shape[1])):
            there = f"is {list(expected)}" if expected else "is not part of the model"
            raise WrongWeights(path, f"it does not fit: it changes {name} as {list(shape)}, which {there}")
    return Lora(path, *parts)


def merge(lora: Lora, text_encoder: torch.nn.Module) -> None:
    """Add the part for the CLIP encoder to it. Raises `WrongWeights`."""
    modules = dict(text_encoder.named_modules())
    for name, delta in lora.text_encoder.items():
        layer = modules.get(name) or modules.get(name.removeprefix("text_model."))
        shape = (delta.up.shape[0], delta.down.shape[1])
        if not isinstance(layer, torch.nn.Linear) or layer.weight.shape != shape:
            raise WrongWeights(lora.path, f"it does not fit: it changes the text encoder's {name} as {list(shape)}")
        with torch.no_grad():
            layer.weight.copy_(delta.added_to(layer.weight))


def comfyui(name: str) -> str:
    """ComfyUI also writes peft's words behind its own keys, which diffusers' converter does not take."""
    if name.startswith("diffusion_model."):
        return name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")
    return name


def with_final_alpha(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' converter drops the final layer's alpha: it is multiplied in here."""
    for name in [name for name in tensors if "final_layer" in name and name.endswith(".alpha")]:
        stem = name.removesuffix(".alpha")
        if (up := tensors.get(f"{stem}.lora_up.weight")) is not None:
            tensors[f"{stem}.lora_up.weight"] = up * (tensors.pop(name) / up.shape[1])
    return tensors


def unified(name: str) -> str:
    """One spelling of what the converters return; for embedders they forget the prefix."""
    for theirs, ours in CLIP_LAYERS.items():
        name = name.replace(f".{theirs}_lora.", f".{ours}.lora.")
    name = name.replace(".lora_linear_layer.", ".lora.")
    name = name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
    return name if name.startswith(PARTS) else f"transformer.{name}"


def pairs(
    path: Path, named: Mapping[str, torch.Tensor], alphas: Mapping[str, Any], header: Header, scale: float
) -> dict[str, Delta]:
    """Deltas from `X.lora_A.weight` and `X.lora_B.weight`; every tensor must be one of these."""
    try:
        adapter = dict(json.loads(header.metadata.get(ADAPTER, "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise WrongWeights(path, f"its {ADAPTER} is damaged ({error})") from error
    deltas: dict[str, Delta] = {}
    for key, down in named.items():
        name, mark, _ = key.partition(".lora_A.")
        if not mark:
            if key.partition(".lora_B.")[0] + ".lora_A.weight" not in named:
                raise WrongWeights(path, f"it holds {key}, which is no part of a LoRA that can be merged")
            continue
        up = named.get(f"{name}.lora_B.weight")
        if up is None or down.ndim != 2 or up.ndim != 2:
            raise WrongWeights(path, f"{name} has no pair of matrices")
        alpha = alphas.get(f"{name}.alpha")
        rank = down.shape[0]
        factor = scale * (float(alpha) / rank if alpha is not None else adapter_factor(path, name, rank, adapter))
        deltas[name] = Delta(up, down, factor)
    return deltas


def adapter_factor(path: Path, name: str, rank: int, adapter: Mapping[str, Any]) -> float:
    """alpha / rank as the file's own peft configuration has it; 1 without one."""
    part, _, module = name.partition(".")
    if adapter.get(f"{part}.use_dora"):
        raise WrongWeights(path, "a DoRA: only plain LoRA can be merged")
    patterns = adapter.get(f"{part}.alpha_pattern") or {}
    alpha = next((a for pattern, a in patterns.items() if module.endswith(pattern)), adapter.get(f"{part}.lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (sqrt(rank) if adapter.get(f"{part}.use_rslora") else rank)
