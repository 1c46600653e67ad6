"""Describes a weights file or folder from its headers alone. No torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights.checkpoints import CHECKPOINTS
from weights.formats.architecture import Architecture
from weights.formats.detect import (
    FORMATS,
    LYCORIS_MARKS,
    count_parameters,
    detect_format,
    match_tensors,
    nearest_architecture,
)
from weights.formats.headers import read_header
from weights.formats.snapshot import check_snapshot
from weights.formats.tensors import Header


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file holds. `models` are the ids in `CHECKPOINTS` that it can serve: none where there is a `problem`."""

    path: str
    format: str
    title: str
    bytes: int
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]  # parameters of each type
    architecture: str | None
    models: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    beside: int
    problem: str | None


def inspect(path: Path) -> Inspection:
    """Raises `WeightsError` for what cannot be read at all."""
    header = read_header(path)
    format_key = detect_format(header)
    infos = header.tensors.values()
    size = sum(file.stat().st_size for file in {tensor.file for tensor in infos})
    dtypes: Counter[str] = Counter()
    for tensor in infos:
        dtypes[tensor.dtype] += tensor.parameters
    common = (str(path), format_key, FORMATS[format_key].title, size, len(infos))
    if format_key == "lora":
        return Inspection(*common, dtypes.total(), dict(dtypes), None, (), (), (), 0, _find_lora_problem(header))
    architecture = nearest_architecture(header)
    match = match_tensors(header, architecture.config)
    if (path / "model_index.json").is_file():
        check_snapshot(path)
    return Inspection(
        *common,
        count_parameters(match),
        dict(dtypes.most_common()),
        architecture.title,
        () if match.problem else list_models(architecture),
        match.missing,
        match.unexpected,
        len(match.other_models),
        match.problem,
    )


def list_models(architecture: Architecture) -> tuple[str, ...]:
    """The ids of the checkpoints that have this architecture."""
    return tuple(row.id for row in CHECKPOINTS.values() if architecture.name and row.architecture == architecture.name)


def _find_lora_problem(header: Header) -> str | None:
    """LyCORIS variants are recognized, but cannot be merged."""
    if any(mark in name for name in header.tensors for mark in LYCORIS_MARKS):
        return "a LyCORIS file (LoKr or LoHa): only plain LoRA is merged"
    return None
