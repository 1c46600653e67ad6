"""Stored tensors as torch tensors, one at a time. Imports torch.

The file is read, not mapped into memory, so the process uses no more memory than the tensor at hand and the next one
need, and the system's figures show it. Memory that is new to a process is slow to read into, since the system has to
clear each page first: of many tensors, all are read into the same two buffers, each while its predecessor is in use.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from pkgutil import resolve_name
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from weights.errors import WrongWeights
from weights.formats.detect import FORMATS, TensorMatch
from weights.formats.tensors import TensorInfo

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Stored rows `(rows, bytes a row)` in uint8, what the header says of them, and their scale: the values `(rows, ...)`.
FormatReader = Callable[[torch.Tensor, TensorInfo, torch.Tensor | None], torch.Tensor]


def byte_view(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def row_bytes(info: TensorInfo) -> int:
    return info.size // (info.shape[0] if info.shape else 1)


def swap_halves(values: torch.Tensor) -> torch.Tensor:
    """The two halves of the rows change places."""
    return torch.cat(values.chunk(2)[::-1])


def read_plain(stored: torch.Tensor, info: TensorInfo, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """The values in the file's own type."""
    return stored.reshape(-1).view(DTYPES[info.dtype]).reshape(stored.shape[0], *info.shape[1:])


def read_scaled(stored: torch.Tensor, info: TensorInfo, scale: torch.Tensor | None) -> torch.Tensor:
    """The values times their scale `(1,)` or `(rows,)`, in float32; in the file's own type where there is no scale."""
    values = read_plain(stored, info, None)
    if scale is None:
        return values
    return values.float() * scale.float().reshape(-1, *[1] * (values.ndim - 1))


def read_gguf(stored: torch.Tensor, info: TensorInfo, scale: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """The values in float32, by diffusers' functions. Raises `WrongWeights` for a type that diffusers lacks.

    diffusers itself calls them without a type, and they then compute in the float16 of the stored scales.
    """
    if info.dtype in DTYPES:
        return read_plain(stored, info, None)
    from diffusers.quantizers.gguf.utils import dequantize_functions
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    quantization = GGMLQuantizationType[info.dtype]
    if quantization not in dequantize_functions:
        raise WrongWeights(info.file, f"{info.dtype} is a GGUF type that diffusers does not read")
    values, size = GGML_QUANT_SIZES[quantization]  # of a block, the latter in bytes
    blocks = stored.reshape(-1, size)
    decoded: torch.Tensor = dequantize_functions[quantization](blocks, values, size, dtype=torch.float32)
    return decoded.reshape(stored.shape[0], *info.shape[1:])


class StoredTensor(NamedTuple):
    """What a file has of a tensor: rows of bytes, what the header says of them, and their scale."""

    rows: torch.Tensor
    info: TensorInfo
    scale: torch.Tensor | None

    def move(self, device: torch.device | None) -> "StoredTensor":
        scale = None if self.scale is None else self.scale.to(device)
        return StoredTensor(self.rows.to(device), self.info, scale)


class TensorReader:
    """Reads the transformer's tensors by diffusers' names, whatever the format. A context manager: it opens files."""

    def __init__(self, match: TensorMatch) -> None:
        self._match = match
        self._files: dict[Path, BufferedReader] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the file's type, or in float32 where it was quantized. Raises `WrongWeights`."""
        return self._decode(name, self._read_stored(name))

    def read_all(
        self, names: Iterable[str], *, pinned: bool = False, device: torch.device | None = None
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Names and tensors as of `read`, in the order of the files; while one is in use a thread reads the next.

        A tensor is valid until the next one is asked for: it may lie in one of two buffers, of the largest tensor's
        size, that are used again and again. It is moved to `device` as it is stored, and decoded there; None: it stays
        on the CPU. `pinned` buffers are copied to a CUDA device fastest. To be closed if not read to the end. Raises
        `WrongWeights`.
        """
        ordered = sorted(names, key=self._place)
        size = max(map(self._stored_bytes, ordered), default=0)
        buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
            ahead = [thread.submit(self._read_stored, name, buffers[0]) for name in ordered[:1]]
            for number, name in enumerate(ordered, 1):
                stored = ahead.pop().result()
                ahead = [
                    thread.submit(self._read_stored, following, buffers[number % 2])
                    for following in ordered[number : number + 1]
                ]
                yield name, self._decode(name, stored.move(device))

    def _place(self, name: str) -> tuple[str, int]:
        """Where a tensor begins: on a disk it is fastest to read onwards."""
        part = self._match.slices[name]
        info = self._match.header.tensors[part.source]
        return str(info.file), info.start + part.start * row_bytes(info)

    def _stored_bytes(self, name: str) -> int:
        part = self._match.slices[name]
        return (part.stop - part.start) * row_bytes(self._match.header.tensors[part.source])

    def _read_stored(self, name: str, buffer: torch.Tensor | None = None) -> StoredTensor:
        part = self._match.slices[name]
        info = self._match.header.tensors[part.source]
        scale = self._read_scale(part.scale, part.start, part.stop) if part.scale else None
        return StoredTensor(self._read_rows(info, part.start, part.stop, buffer), info, scale)

    def _decode(self, name: str, stored: StoredTensor) -> torch.Tensor:
        values = self._read_format(*stored)
        return swap_halves(values) if self._match.slices[name].swap_halves else values

    def _read_scale(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self._match.header.tensors[name]
        values = read_plain(self._read_rows(info, 0, info.shape[0] if info.shape else 1), info, None).reshape(-1)
        return values[start:stop] if values.numel() > 1 else values

    def _read_rows(self, info: TensorInfo, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """The bytes of rows `start` to `stop`: `(rows, bytes a row)`, uint8, at the beginning of a buffer if given."""
        width = row_bytes(info)
        size = (stop - start) * width
        buffer = (torch.empty(size, dtype=torch.uint8) if into is None else into[:size]).view(stop - start, width)
        if info.file not in self._files:
            self._files[info.file] = self._stack.enter_context(info.file.open("rb"))
        file = self._files[info.file]
        file.seek(info.start + start * width)
        if file.readinto(byte_view(buffer)) != buffer.numel():
            raise WrongWeights(info.file, "it became shorter while it was read")
        return buffer

    @cached_property
    def _read_format(self) -> FormatReader:
        name = FORMATS[self._match.format].reader
        assert name is not None  # `match_tensors` refuses a LoRA
        reader: FormatReader = resolve_name(name)
        return reader
