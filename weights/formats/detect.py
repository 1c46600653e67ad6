"""Which format a transformer's file has, and where each tensor lies in it. Reads headers only; no torch.

A format is recognized by its header, never by the file's name. Its reader is a function in `weights.formats.read`,
named by a string so that it is imported only when tensors are read. Which keys name the tensors (diffusers' or the
original ones, with or without a prefix) is found in the same way for every format. A file that holds anything but
exactly the architecture's tensors is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from weights.errors import WrongWeights
from weights.formats.architecture import (
    ARCHITECTURES,
    SWAPPED_HALVES,
    Architecture,
    TransformerConfig,
    original_to_diffusers,
    stack_shape,
    tensor_shapes,
)
from weights.formats.tensors import Header, TensorInfo

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SCALE_SUFFIXES = ("scale_weight", "weight_scale")  # beside a tensor X.weight: X.scale_weight, to multiply it with
OTHER_SUFFIXES = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")  # beside a weight, and not needed
XLABS_MARKS = (".processor.proj_lora", ".processor.qkv_lora")
LYCORIS_MARKS = (".lokr_w", ".hada_w")
LORA_MARKS = (
    *(".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.up.", ".lora.down."),
    *(*XLABS_MARKS, *LYCORIS_MARKS),
)
NORMS_WEIGHTS = (".query_norm.weight", ".key_norm.weight")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
FP8_ROWS = "srpo-fp8-rows"  # the layout in the metadata of our own fp8 files
SCALE_DTYPES = ("F32", "BF16", "F16")
READABLE_DTYPES = (*SCALE_DTYPES, *FLOAT8)


class Format(NamedTuple):
    """One format: its title, the test that recognizes its header, and the function that reads one of its tensors.

    `reader` is None for a file that is not a whole transformer (a LoRA).
    """

    title: str
    detect: Callable[[Header], bool]
    reader: str | None = "weights.formats.read:read_plain"


def _has_key(header: Header, *parts: str) -> bool:
    return any(part in name for name in header.tensors for part in parts)


def _is_fp8(header: Header) -> bool:
    return any(tensor.dtype in FLOAT8 for tensor in header.tensors.values())


def _is_scaled_fp8(header: Header) -> bool:
    return _is_fp8(header) and any(name.rpartition(".")[2] in SCALE_SUFFIXES for name in header.tensors)


def _is_fp8_rows(header: Header) -> bool:
    return header.metadata.get("layout") == FP8_ROWS


FORMATS: Mapping[str, Format] = {  # the first that detects a header is its format
    "lora": Format("a LoRA, to be added to a transformer", lambda header: _has_key(header, *LORA_MARKS), None),
    "gguf": Format("GGUF", lambda header: header.container == "gguf", "weights.formats.read:read_gguf"),
    "fp8-rows": Format("fp8 of this server, a scale a row", _is_fp8_rows, "weights.formats.read:read_scaled"),
    "fp8-scaled": Format("fp8 with scales", _is_scaled_fp8, "weights.formats.read:read_scaled"),
    "fp8": Format("fp8 without scales", _is_fp8),
    "folder": Format("a diffusers folder", lambda header: header.folder),
    "comfyui": Format("original FLUX keys with a prefix (ComfyUI)", lambda header: _has_key(header, *PREFIXES)),
    "original": Format("original FLUX keys", lambda header: _has_key(header, "double_blocks.", "single_blocks.")),
    "diffusers": Format("diffusers keys in one file", lambda header: _has_key(header, "transformer_blocks.")),
}


def detect_format(header: Header) -> str:
    """The key of `FORMATS`. Raises `WrongWeights` where none fits."""
    for key, row in FORMATS.items():
        if row.detect(header):
            return key
    some = ", ".join(sorted(header.tensors)[:3]) or "none at all"
    raise WrongWeights(header.path, f"not a FLUX transformer and not a LoRA (its tensors: {some} ...)")


class TensorSlice(NamedTuple):
    """Where one tensor of the transformer lies: rows `start` to `stop` of the stored tensor `source`.

    `scale` names the stored tensor to multiply it with: one number, or one for each row of `source`. `swap_halves`: the
    two halves of its rows change places.
    """

    source: str
    start: int
    stop: int
    swap_halves: bool = False
    scale: str | None = None


@dataclass(frozen=True, slots=True)
class TensorMatch:
    """A header compared with an architecture: where each tensor is found, and what does not fit."""

    format: str
    header: Header
    slices: Mapping[str, TensorSlice]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatches: tuple[str, ...]  # a sentence for each tensor whose shape or type is not the expected one
    other_models: tuple[str, ...]  # tensors of other models in the same file; they are not read

    @property
    def problem(self) -> str | None:
        """What does not fit, in one line; None where all fits."""
        if self.mismatches:
            more = f" (and {len(self.mismatches) - 1} more)" if len(self.mismatches) > 1 else ""
            return f"{self.mismatches[0]}{more}"
        if self.missing or self.unexpected:
            return (
                f"{len(self.missing)} tensors are missing{_name_first(self.missing)} and {len(self.unexpected)} are "
                f"not part of the model{_name_first(self.unexpected)}"
            )
        return None


def match_tensors(header: Header, config: TransformerConfig) -> TensorMatch:
    """Find every tensor of the architecture. Raises `WrongWeights` for a file that is no transformer at all."""
    format_key = detect_format(header)
    if FORMATS[format_key].reader is None:
        raise WrongWeights(header.path, f"{FORMATS[format_key].title}: name it with --lora, beside a whole transformer")
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in header.tensors)), "")
    full_names = {_respell(name.removeprefix(prefix)): name for name in header.tensors if name.startswith(prefix)}
    weights = {name for name in full_names if name.rpartition(".")[2] not in (*SCALE_SUFFIXES, *OTHER_SUFFIXES)}
    shapes = tensor_shapes(config)
    original = any(name.startswith(("double_blocks.", "single_blocks.")) for name in weights)
    expected = original_to_diffusers(config) if original else {name: (name,) for name in shapes}
    slices: dict[str, TensorSlice] = {}
    mismatches: list[str] = []
    for name, parts in expected.items():
        if name not in weights:
            continue
        tensor, start = header.tensors[full_names[name]], 0
        shape = stack_shape(shapes, parts)
        if mismatch := _describe_mismatch(full_names[name], tensor, shape, header.container):
            mismatches.append(mismatch)
            continue
        scale = _find_scale(name, full_names)
        if scale and (mismatch := _describe_scale_mismatch(scale, header.tensors[scale], shape[0])):
            mismatches.append(mismatch)
            continue
        for part in parts:
            rows = shapes[part][0]
            slices[part] = TensorSlice(full_names[name], start, start + rows, name.startswith(SWAPPED_HALVES), scale)
            start += rows
    missing, unexpected = sorted(set(expected) - weights), sorted(weights - set(expected))
    other_models = sorted(set(header.tensors) - set(full_names.values()))
    return TensorMatch(
        format_key, header, slices, tuple(missing), tuple(unexpected), tuple(mismatches), tuple(other_models)
    )


def _respell(name: str) -> str:
    """The original key of a norm, which newer ComfyUI saves as `weight` (Comfy-Org/ComfyUI, pull request 12432)."""
    return f"{name.removesuffix('weight')}scale" if name.endswith(NORMS_WEIGHTS) else name


def _describe_mismatch(name: str, tensor: TensorInfo, shape: tuple[int, ...], container: str) -> str | None:
    if tensor.shape != shape:
        return f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
    if container == "safetensors" and tensor.dtype not in READABLE_DTYPES:
        return f"{name} holds {tensor.dtype}, expected one of {', '.join(READABLE_DTYPES)}"
    return None


def _describe_scale_mismatch(name: str, scale: TensorInfo, rows: int) -> str | None:
    """A scale for each group of values is refused too: its numbers would be taken for those of rows."""
    if scale.parameters != 1 and scale.shape not in ((rows,), (rows, 1)):
        return f"{name} has shape {list(scale.shape)}, expected one scale, or one a row: [1], [{rows}] or [{rows}, 1]"
    if scale.dtype not in SCALE_DTYPES:
        return f"{name} holds {scale.dtype}, expected one of {', '.join(SCALE_DTYPES)}"
    return None


def _find_scale(name: str, full_names: Mapping[str, str]) -> str | None:
    stem = name.removesuffix(".weight")
    return next((full_names[f"{stem}.{end}"] for end in SCALE_SUFFIXES if f"{stem}.{end}" in full_names), None)


def nearest_architecture(header: Header) -> Architecture:
    """The architecture to compare a file with: the one of its width, with or without guidance."""
    if header.config:
        config = TransformerConfig.from_config(header.config)
        known = (known for known in ARCHITECTURES if known.config == config)
        return next(known, Architecture(None, "its own config.json's", config))
    inputs = ("x_embedder.weight", "img_in.weight")
    width = next((tensor.shape[0] for name, tensor in header.tensors.items() if name.endswith(inputs)), 0)
    guidance = _has_key(header, "guidance")
    same_width = [known for known in ARCHITECTURES if known.config.inner_dim == width] or list(ARCHITECTURES)
    return next((known for known in same_width if known.config.guidance_embeds == guidance), same_width[0])


def count_parameters(match: TensorMatch) -> int:
    """How many parameters the transformer's own tensors hold."""
    sources = {part.source for part in match.slices.values()}
    return sum(prod(match.header.tensors[name].shape) for name in sources)


def require_match(path: Path, match: TensorMatch) -> None:
    """Raises `WrongWeights` unless the file holds exactly the architecture's tensors."""
    if problem := match.problem:
        raise WrongWeights(path, problem)


def _name_first(names: tuple[str, ...]) -> str:
    return f" (first: {names[0]})" if names else ""
