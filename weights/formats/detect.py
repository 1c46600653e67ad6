"""The formats a transformer comes in: one row each, told apart by content. No torch; headers only.

A row's detector looks at a header; its reader, named for a lazy import, turns a stored tensor into numbers. How
tensors are named (diffusers' keys or the original ones, with or without a prefix) is found for every row alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from weights.errors import WrongWeights
from weights.formats.architecture import ARCHITECTURES, SWAPPED, Architecture, Geometry, shapes, stacks
from weights.formats.tensors import Header, TensorInfo

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SCALES = ("scale_weight", "weight_scale")  # beside a tensor X.weight: X.scale_weight, to multiply it with
COMPANIONS = (*SCALES, "scale_input", "input_scale", "comfy_quant", "scaled_fp8")  # beside weights, not weights
LORA = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.up.", ".lora.down.", ".lokr_w", ".hada_w")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
PLAIN = ("F32", "BF16", "F16", *FLOAT8)


class Format(NamedTuple):
    """A row: what it is, how it is known, and the function that reads one of its tensors (None: not served alone)."""

    title: str
    detect: Callable[[Header], bool]
    reader: str | None = "weights.formats.read:plain"


def _has(header: Header, *marks: str) -> bool:
    return any(mark in name for name in header.tensors for mark in marks)


def _is_fp8(header: Header) -> bool:
    return any(tensor.dtype in FLOAT8 for tensor in header.tensors.values())


def _is_scaled(header: Header) -> bool:
    return _is_fp8(header) and any(name.rpartition(".")[2] in SCALES for name in header.tensors)


def _is_ours(header: Header) -> bool:
    return header.metadata.get("layout") == "srpo-fp8-rows"


FORMATS: Mapping[str, Format] = {  # the first that detects a header is its format
    "lora": Format("a LoRA, to be added to a transformer", lambda header: _has(header, *LORA), None),
    "gguf": Format("GGUF", lambda header: header.container == "gguf", "weights.formats.read:gguf"),
    "fp8-rows": Format("fp8 of this server, a scale a row", _is_ours, "weights.formats.read:scaled"),
    "fp8-scaled": Format("fp8 with scales", _is_scaled, "weights.formats.read:scaled"),
    "fp8": Format("fp8 without scales", _is_fp8),
    "folder": Format("a diffusers folder", lambda header: header.folder),
    "comfyui": Format("original FLUX keys with a prefix (ComfyUI)", lambda header: _has(header, *PREFIXES)),
    "original": Format("original FLUX keys", lambda header: _has(header, "double_blocks.", "single_blocks.")),
    "diffusers": Format("diffusers keys in one file", lambda header: _has(header, "transformer_blocks.")),
}


def format_of(header: Header) -> str:
    """The key of `FORMATS`. Raises `WrongWeights` where none fits."""
    for key, row in FORMATS.items():
        if row.detect(header):
            return key
    some = ", ".join(sorted(header.tensors)[:3]) or "none at all"
    raise WrongWeights(header.path, f"not a FLUX transformer and not a LoRA (its tensors: {some} ...)")


class Piece(NamedTuple):
    """Where one tensor of the transformer lies: rows `start` to `stop` of a stored one, and what scales it."""

    source: str
    start: int
    stop: int
    swapped: bool = False  # the halves of the rows stand the other way round
    scale: str | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A header beside an architecture: where each tensor is found, and what is wrong."""

    format: str
    header: Header
    pieces: Mapping[str, Piece]
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    wrong: tuple[str, ...]  # a sentence for each tensor of another shape or of a type that is not read
    beside: tuple[str, ...]  # tensors of other models in the same file: they are not read

    @property
    def problem(self) -> str | None:
        """What is wrong, in one line."""
        if self.wrong:
            return f"{self.wrong[0]}" + (f" (and {len(self.wrong) - 1} more)" if len(self.wrong) > 1 else "")
        if self.missing or self.surplus:
            return (
                f"{len(self.missing)} tensors are missing{_first(self.missing)} and {len(self.surplus)} are not part "
                f"of the model{_first(self.surplus)}"
            )
        return None


def match(header: Header, geometry: Geometry) -> Match:
    """Find every tensor of the architecture. Raises `WrongWeights` for what is no transformer at all."""
    kind = format_of(header)
    if FORMATS[kind].reader is None:
        raise WrongWeights(header.path, f"{FORMATS[kind].title}: name it with --lora, beside a whole transformer")
    prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in header.tensors)), "")
    found = {name.removeprefix(prefix): name for name in header.tensors if name.startswith(prefix)}
    weights = {name for name in found if name.rpartition(".")[2] not in COMPANIONS}
    ours = shapes(geometry)
    original = any(name.startswith(("double_blocks.", "single_blocks.")) for name in weights)
    wanted = stacks(geometry) if original else {name: (name,) for name in ours}
    pieces: dict[str, Piece] = {}
    wrong: list[str] = []
    for name, stack in wanted.items():
        if name not in weights:
            continue
        tensor, start = header.tensors[found[name]], 0
        expected = (sum(ours[part][0] for part in stack), *ours[stack[0]][1:])
        if problem := _misfit(found[name], tensor, expected, header.container):
            wrong.append(problem)
            continue
        scale = _scale(name, found)
        for part in stack:
            rows = ours[part][0]
            pieces[part] = Piece(found[name], start, start + rows, name.startswith(SWAPPED), scale)
            start += rows
    missing, surplus = set(wanted) - weights, weights - set(wanted)
    beside = tuple(sorted(set(header.tensors) - set(found.values())))
    return Match(kind, header, pieces, tuple(sorted(missing)), tuple(sorted(surplus)), tuple(wrong), beside)


def _misfit(name: str, tensor: TensorInfo, expected: tuple[int, ...], container: str) -> str | None:
    if tensor.shape != expected:
        return f"{name} has shape {list(tensor.shape)}, expected {list(expected)}"
    if container == "safetensors" and tensor.dtype not in PLAIN:
        return f"{name} holds {tensor.dtype}, expected one of {', '.join(PLAIN)}"
    return None


def _scale(name: str, found: Mapping[str, str]) -> str | None:
    stem = name.removesuffix(".weight")
    return next((found[f"{stem}.{word}"] for word in SCALES if f"{stem}.{word}" in found), None)


def nearest(header: Header) -> Architecture:
    """The architecture to compare a file with: of its width, with or without guidance."""
    if header.config:
        geometry = Geometry.from_config(header.config)
        known = (known for known in ARCHITECTURES if known.geometry == geometry)
        return next(known, Architecture("its own config.json's", geometry, ()))
    widths = (t.shape[0] for name, t in header.tensors.items() if name.endswith(("x_embedder.weight", "img_in.weight")))
    width, guided = next(widths, 0), _has(header, "guidance")
    alike = [known for known in ARCHITECTURES if known.geometry.width == width] or list(ARCHITECTURES)
    return next((known for known in alike if known.geometry.guidance_embeds == guided), alike[0])


def parameters(match_: Match) -> int:
    """How many numbers the transformer's own tensors hold."""
    sources = {piece.source for piece in match_.pieces.values()}
    return sum(prod(match_.header.tensors[name].shape) for name in sources)


def check(path: Path, found: Match) -> None:
    """Raises `WrongWeights` unless the file holds exactly the architecture's tensors."""
    if problem := found.problem:
        raise WrongWeights(path, problem)


def _first(names: tuple[str, ...]) -> str:
    return f" (first: {names[0]})" if names else ""
