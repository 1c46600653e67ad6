"""Stored tensors as numbers: one at a time, read from the file as they are asked for. Imports torch.

A file is read, not mapped: the memory that is used is that of the tensor in hand, and can be seen to be.
"""

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from weights.errors import WrongWeights
from weights.formats.detect import FORMATS, Match
from weights.formats.tensors import TensorInfo

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Reader = Callable[[torch.Tensor, TensorInfo, torch.Tensor | None], torch.Tensor]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def plain(stored: torch.Tensor, kind: TensorInfo, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """As stored. `stored` is `(rows, bytes a row)`, uint8; the result `(rows, ...)` in the type of the file."""
    return stored.reshape(-1).view(DTYPES[kind.dtype]).reshape(stored.shape[0], *kind.shape[1:])


def scaled(stored: torch.Tensor, kind: TensorInfo, scale: torch.Tensor | None) -> torch.Tensor:
    """`plain` times its scale `(1,)` or `(rows,)`, in float32."""
    values = plain(stored, kind, None)
    if scale is None:
        return values
    return values.float() * scale.float().reshape(-1, *[1] * (values.ndim - 1))


def gguf(stored: torch.Tensor, kind: TensorInfo, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """Dequantized by diffusers' own functions."""
    if kind.dtype in DTYPES:
        return plain(stored, kind, None)
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor
    from gguf import GGMLQuantizationType

    quantization = GGMLQuantizationType[kind.dtype]
    if quantization not in dequantize_functions:
        raise WrongWeights(kind.file, f"{kind.dtype} is a GGUF type that diffusers does not read")
    values: torch.Tensor = dequantize_gguf_tensor(GGUFParameter(stored, quant_type=quantization))
    return values


class Source:
    """The transformer's tensors by diffusers' names, whatever the file looks like. A context manager."""

    def __init__(self, found: Match) -> None:
        self._found = found
        self._files: dict[Path, BufferedReader] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the file's type, or in float32 where it was quantized. Raises `WrongWeights`."""
        piece = self._found.pieces[name]
        kind = self._found.header.tensors[piece.source]
        scale = self._scale(piece.scale, piece.start, piece.stop) if piece.scale else None
        values = self._reader(self._rows(kind, piece.start, piece.stop), kind, scale)
        return torch.cat(values.chunk(2)[::-1]) if piece.swapped else values

    def _scale(self, name: str, start: int, stop: int) -> torch.Tensor:
        kind = self._found.header.tensors[name]
        values = plain(self._rows(kind, 0, kind.shape[0] if kind.shape else 1), kind, None).reshape(-1)
        return values[start:stop] if values.numel() > 1 else values

    def _rows(self, kind: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """The bytes of some rows, `(rows, bytes a row)`."""
        width = kind.size // (kind.shape[0] if kind.shape else 1)
        buffer = torch.empty((stop - start, width), dtype=torch.uint8)
        if kind.file not in self._files:
            self._files[kind.file] = self._stack.enter_context(kind.file.open("rb"))
        file = self._files[kind.file]
        file.seek(kind.start + start * width)
        if file.readinto(bytes_of(buffer)) != buffer.numel():
            raise WrongWeights(kind.file, "it became shorter while it was read")
        return buffer

    @cached_property
    def _reader(self) -> Reader:
        module, _, function = (FORMATS[self._found.format].reader or "").partition(":")
        reader: Reader = getattr(importlib.import_module(module), function)
        return reader
