"""What a weights file or folder is, from its headers alone. No torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights.formats.detect import FORMATS, LORA, format_of, match, nearest, parameters
from weights.formats.headers import read_header
from weights.formats.snapshot import check_snapshot
from weights.formats.tensors import Header


@dataclass(frozen=True, slots=True)
class Inspection:
    """`models` are the ids of `CHECKPOINTS` that the file could serve; none where `problem` says what is wrong."""

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
    kind = format_of(header)
    stored = header.tensors.values()
    size = sum(file.stat().st_size for file in {tensor.file for tensor in stored})
    dtypes: Counter[str] = Counter()
    for tensor in stored:
        dtypes[tensor.dtype] += tensor.parameters
    common = (str(path), kind, FORMATS[kind].title, size, len(stored))
    if kind == "lora":
        return Inspection(*common, dtypes.total(), dict(dtypes), None, (), (), (), 0, _unknown_lora(header))
    architecture = nearest(header)
    found = match(header, architecture.geometry)
    if (path / "model_index.json").is_file():
        check_snapshot(path)
    return Inspection(
        *common,
        parameters(found),
        dict(dtypes.most_common()),
        architecture.title,
        () if found.problem else architecture.models,
        found.missing,
        found.surplus,
        len(found.beside),
        found.problem,
    )


def _unknown_lora(header: Header) -> str | None:
    """LyCORIS variants are detected, and not merged."""
    if any(mark in name for name in header.tensors for mark in LORA[-2:]):
        return "a LyCORIS file (LoKr or LoHa): only plain LoRA is merged"
    return None
