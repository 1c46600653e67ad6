"""What a header says: the name, type, shape and place of every stored tensor. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple


class TensorInfo(NamedTuple):
    """Where a stored tensor lies: bytes `start` to `start + size` of `file`.

    `dtype` is the name that the container uses, such as `BF16` (safetensors) or `Q4_0` (GGUF).
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def parameters(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one file, or of all shards of a folder. `config`: a folder's `config.json`, else empty."""

    path: Path
    container: str  # safetensors or gguf
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    folder: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
