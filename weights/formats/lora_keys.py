"""The keys of LoRA files, translated to diffusers' names by tables of our own and by diffusers' converters.

Imports torch. The converters silently drop what they do not know. Here each matrix is followed through them, and a file
is refused if they drop any of it.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from diffusers import FluxPipeline

from weights.errors import WrongWeights

Tensors = dict[str, torch.Tensor]

PARTS = ("transformer.", "text_encoder.")
UP_ENDINGS = (".lora_up.weight", ".lora_B.weight", ".up.weight")
DOWN_ENDINGS = (".lora_down.weight", ".lora_A.weight", ".down.weight")
ALPHA = ".alpha"
CLIP_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # diffusers' old names
ONETRAINER_PREFIX = "lora_transformer_"
ONETRAINER_CLIP = re.compile(
    r"lora_te1_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)
PEFT_PREFIX = "base_model.model."


def convert(path: Path, tensors: Tensors, weights: Collection[str]) -> tuple[Tensors, Tensors]:
    """The matrices `X.lora_A.weight` and `X.lora_B.weight`, and the alphas `X.alpha`, where X is one of `PARTS` and the
    name of a layer. `weights` are the names of the transformer's tensors.

    Raises `WrongWeights` where a tensor is no part of a plain LoRA, or where the converter drops it.
    """
    require_pairs(path, tensors)
    tensors = fold_final_alpha({translate_comfyui_key(name): tensor for name, tensor in tensors.items()})
    tensors = translate_onetrainer(path, tensors, weights)
    if is_peft(tensors, weights):
        tensors = {f"transformer.{name.removeprefix(PEFT_PREFIX)}": tensor for name, tensor in tensors.items()}
    if dropped := find_dropped(path, tensors):
        raise WrongWeights(path, f"it holds {dropped}, which diffusers' converter does not understand")
    return run_converter(path, tensors)


def run_converter(path: Path, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Matrices and alphas as diffusers' converter returns them, their keys in one spelling. Raises `WrongWeights`."""
    try:
        converted, alphas = FluxPipeline.lora_state_dict(dict(tensors), return_alphas=True)
    except (ValueError, KeyError, AssertionError, NotImplementedError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise WrongWeights(path, f"diffusers' converter cannot take its keys ({reason})") from error
    matrices = {normalize_key(name): tensor for name, tensor in converted.items()}
    return matrices, {normalize_key(name): alpha for name, alpha in (alphas or {}).items()}


def require_pairs(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises `WrongWeights` unless each tensor is one of a pair of matrices, or the alpha of one."""
    pairs = dict(zip((*UP_ENDINGS, *DOWN_ENDINGS), (*DOWN_ENDINGS, *UP_ENDINGS), strict=True))
    for name, tensor in tensors.items():
        ending = next((ending for ending in pairs if name.endswith(ending)), None)
        if ending:
            stem = name.removesuffix(ending)
            other = tensors.get(stem + pairs[ending])
            if other is None or (tensor.ndim, other.ndim) != (2, 2):
                raise WrongWeights(path, f"{stem} has no pair of matrices")
        elif not name.endswith(ALPHA) or not any(name.removesuffix(ALPHA) + up in tensors for up in UP_ENDINGS):
            raise WrongWeights(path, f"it holds {name}, which is no part of a LoRA that can be merged")


def find_dropped(path: Path, tensors: Tensors) -> str | None:
    """The first tensor of which the converter drops or overwrites a row, or None. A tensor of zeros changes nothing.

    The converter is given matrices of rank 1: each row of the up matrix number n holds n, whatever layer it goes to.
    """
    ups = [name for name in tensors if name.endswith(UP_ENDINGS)]
    marked = {name: torch.zeros(1, tensor.shape[1]) for name, tensor in tensors.items() if name.endswith(DOWN_ENDINGS)}
    marked |= {name: torch.full((tensors[name].shape[0], 1), float(number)) for number, name in enumerate(ups, 1)}
    kept: Counter[int] = Counter()
    for name, tensor in run_converter(path, {name: marked[name] for name in tensors if name in marked})[0].items():
        if ".lora_B." in name:
            kept.update(tensor.flatten().int().tolist())
    dropped = (name for number, name in enumerate(ups, 1) if kept[number] != tensors[name].shape[0])
    return next((name for name in dropped if tensors[name].any()), None)


def translate_comfyui_key(name: str) -> str:
    """ComfyUI also writes its own keys with peft's endings, which diffusers' converter does not accept."""
    if name.startswith("diffusion_model."):
        return name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")
    return name


def translate_onetrainer(path: Path, tensors: Tensors, weights: Collection[str]) -> Tensors:
    """OneTrainer writes diffusers' names with underscores. diffusers' converter takes the attention's only."""
    if not any(name.startswith(ONETRAINER_PREFIX) for name in tensors):
        return tensors
    layers = {name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight") for name in weights}
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, ending = name.partition(".")
        ending = ending.replace("lora_down.", "lora_A.").replace("lora_up.", "lora_B.")
        layer = layers.get(stem.removeprefix(ONETRAINER_PREFIX))
        if stem.startswith(ONETRAINER_PREFIX) and layer:
            found[f"transformer.{layer}.{ending}"] = tensor
        elif clip := ONETRAINER_CLIP.fullmatch(stem):
            found[f"text_encoder.text_model.encoder.layers.{clip[1]}.{clip[2]}.{clip[3]}.{ending}"] = tensor
        else:
            raise WrongWeights(path, f"it holds {name}, which is not part of the model")
    return found


def is_peft(tensors: Collection[str], weights: Collection[str]) -> bool:
    """Whether the keys are those that peft saves for diffusers' transformer. (For the original one diffusers has a
    converter.)"""
    stems = (name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for name in tensors if name.startswith(PEFT_PREFIX))
    return any(f"{stem}.weight" in weights for stem in stems)


def fold_final_alpha(tensors: Tensors) -> Tensors:
    """Multiply the final layer's alpha into its matrix, because diffusers' converter drops it."""
    for name in [name for name in tensors if "final_layer" in name and name.endswith(ALPHA)]:
        stem = name.removesuffix(ALPHA)
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
