"""Reads LoRA files, which are merged into the weights while these are loaded. Imports torch.

diffusers' converters translate the keys of kohya, ComfyUI, XLabs and others. They silently drop what they do not know
(weight norms, differences, other text encoders); here a file that holds such tensors is refused.
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
from weights.formats.detect import detect_format
from weights.formats.headers import read_header
from weights.formats.tensors import Header

UNKNOWN = (
    ".dora_scale",
    ".lokr_",
    ".hada_",
    ".diff",
    ".set_weight",
    "text_encoders.t5xxl",
    "lora_te2_",
    "lora_te3_",
)
PARTS = ("transformer.", "text_encoder.")
CLIP_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # diffusers' old names
ADAPTER_METADATA = "lora_adapter_metadata"  # the entry in which diffusers and peft store their configuration


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
    tensors = fold_final_alpha({translate_comfyui_key(name): tensor for name, tensor in load_file(path).items()})
    try:
        converted, alphas = FluxPipeline.lora_state_dict(tensors, return_alphas=True)
    except (ValueError, KeyError, AssertionError, NotImplementedError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WrongWeights(path, f"diffusers' converter cannot take its keys ({reason})") from error
    deltas = pair_matrices(
        path, {normalize_key(name): tensor for name, tensor in converted.items()}, alphas or {}, header, scale
    )
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


def translate_comfyui_key(name: str) -> str:
    """ComfyUI also writes its own keys with peft's endings, which diffusers' converter does not accept."""
    if name.startswith("diffusion_model."):
        return name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")
    return name


def fold_final_alpha(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Multiply the final layer's alpha into its matrix, because diffusers' converter drops it."""
    for name in [name for name in tensors if "final_layer" in name and name.endswith(".alpha")]:
        stem = name.removesuffix(".alpha")
        if (up := tensors.get(f"{stem}.lora_up.weight")) is not None:
            tensors[f"{stem}.lora_up.weight"] = up * (tensors.pop(name) / up.shape[1])
    return tensors


def normalize_key(name: str) -> str:
    """One spelling for the keys that the converters return. For the embedders they omit the prefix."""
    for theirs, ours in CLIP_LAYERS.items():
        name = name.replace(f".{theirs}_lora.", f".{ours}.lora.")
    name = name.replace(".lora_linear_layer.", ".lora.")
    name = name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
    return name if name.startswith(PARTS) else f"transformer.{name}"


def pair_matrices(
    path: Path, tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, Any], header: Header, scale: float
) -> dict[str, Delta]:
    """The deltas from `X.lora_A.weight` and `X.lora_B.weight`. Raises `WrongWeights` for any other tensor."""
    try:
        adapter = dict(json.loads(header.metadata.get(ADAPTER_METADATA, "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise WrongWeights(path, f"its {ADAPTER_METADATA} is damaged ({error})") from error
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
    return deltas


def adapter_scale(path: Path, name: str, rank: int, adapter: Mapping[str, Any]) -> float:
    """alpha / rank from the peft configuration in the file; 1 where the file has none."""
    part, _, module = name.partition(".")
    if adapter.get(f"{part}.use_dora"):
        raise WrongWeights(path, "a DoRA: only plain LoRA can be merged")
    patterns = adapter.get(f"{part}.alpha_pattern") or {}
    matching = (a for pattern, a in patterns.items() if module == pattern or module.endswith(f".{pattern}"))
    alpha = next(matching, adapter.get(f"{part}.lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (sqrt(rank) if adapter.get(f"{part}.use_rslora") else rank)
