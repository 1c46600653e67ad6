"""What writes the formats of `OUTPUT_FORMATS`. Imports torch.

A format first lists every tensor it will store (name, type, shape), so that the header can be written before the first
tensor is converted, and the file from front to back.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from weights.formats.architecture import (
    BLOCK_LINEARS,
    SWAPPED_HALVES,
    Shape,
    TransformerConfig,
    original_to_diffusers,
    stack_shape,
    tensor_shapes,
)
from weights.formats.detect import FP8_ROWS
from weights.formats.read import byte_view, swap_halves

FP8 = torch.float8_e4m3fn
BLOCK = 32  # numbers that share a scale in GGUF's Q4_0 and Q8_0
Q4_BYTES = 18  # a block of 32: a float16 scale and 16 bytes
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3"}
ReadTensor = Callable[[str], torch.Tensor]  # by diffusers' names
MakeTensor = Callable[[ReadTensor], torch.Tensor]


class OutputTensor(NamedTuple):
    """A tensor of the new file: the container's names of it and of its type, its shape, and its size in bytes.

    `make` returns it; each is made once, in the order of the file.
    """

    name: str
    dtype: str
    shape: Shape
    size: int
    make: MakeTensor


class FormatWriter(NamedTuple):
    """How a format is written: what it stores, in the file's order, and what writes the file of the tensors made."""

    list_tensors: Callable[[TransformerConfig], Iterator[OutputTensor]]
    save: Callable[[Path, Sequence[OutputTensor], Iterable[torch.Tensor], Mapping[str, str]], None]


def output_tensor(name: str, dtype: torch.dtype, shape: Shape, make: MakeTensor) -> OutputTensor:
    return OutputTensor(name, DTYPE_NAMES[dtype], shape, prod(shape) * dtype.itemsize, make)


def round_tensor(name: str, shape: Shape) -> OutputTensor:
    """A tensor of the transformer in bfloat16."""
    return output_tensor(name, torch.bfloat16, shape, lambda read: read(name).to(torch.bfloat16))


def list_bf16(config: TransformerConfig) -> Iterator[OutputTensor]:
    for name, shape in tensor_shapes(config).items():
        yield round_tensor(name, shape)


def list_fp8(config: TransformerConfig) -> Iterator[OutputTensor]:
    """The blocks' attention and MLP matrices in fp8 with a float32 scale for each row; all else in bfloat16."""
    for name, shape in tensor_shapes(config).items():
        if BLOCK_LINEARS.fullmatch(name):
            yield from quantize_matrix(name, shape)
        else:
            yield round_tensor(name, shape)


def quantize_matrix(name: str, shape: Shape) -> Iterator[OutputTensor]:
    """The scales of a matrix's rows, and its values; the matrix is read once, and then forgotten."""
    values: list[torch.Tensor] = []

    def make_scale(read: ReadTensor) -> torch.Tensor:
        quantized, scale = quantize_rows(read(name))
        values.append(quantized)
        return scale

    yield output_tensor(f"{name}_scale", torch.float32, (shape[0], 1), make_scale)
    yield output_tensor(name, FP8, shape, lambda _: values.pop())


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in fp8 and their float32 scales `(rows, 1)`. The product is the weight, each value to within 1/16."""
    weight = weight.float()
    largest = torch.finfo(FP8).max
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
    return (weight / scale).clamp(-largest, largest).to(FP8), scale


def save_safetensors(
    file: Path, tensors: Sequence[OutputTensor], made: Iterable[torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Written by hand: the safetensors library wants all tensors in memory at once. The header is a length and JSON."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset := offset + tensor.size]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as output:
        output.write(len(header).to_bytes(8, "little") + header)
        for values in made:
            output.write(byte_view(values.contiguous()))


def save_fp8(
    file: Path, tensors: Sequence[OutputTensor], made: Iterable[torch.Tensor], metadata: Mapping[str, str]
) -> None:
    save_safetensors(file, tensors, made, {"layout": FP8_ROWS, **metadata})


def list_q4(config: TransformerConfig) -> Iterator[OutputTensor]:
    """GGUF with the original keys, for ComfyUI and diffusers: the blocks' matrices in Q4_0, vectors in float32."""
    shapes = tensor_shapes(config)
    for name, parts in original_to_diffusers(config).items():
        shape, stack = stack_shape(shapes, parts), partial(stack_rows, name, parts)
        if all(BLOCK_LINEARS.fullmatch(part) for part in parts) and shape[1] % BLOCK == 0:
            size = prod(shape) // BLOCK * Q4_BYTES
            yield OutputTensor(name, "Q4_0", shape, size, partial(quantize_q4, stack))
        elif len(shape) == 1:
            yield output_tensor(name, torch.float32, shape, stack)
        else:
            yield output_tensor(name, torch.bfloat16, shape, partial(round_bytes, stack))


def stack_rows(name: str, parts: Sequence[str], read: ReadTensor) -> torch.Tensor:
    """The tensor of an original key, in float32."""
    rows = torch.cat([read(part).float() for part in parts])
    return swap_halves(rows) if name.startswith(SWAPPED_HALVES) else rows


def quantize_q4(make: MakeTensor, read: ReadTensor) -> torch.Tensor:
    """The bytes of the blocks of 32."""
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.quantize(make(read).numpy(), GGMLQuantizationType.Q4_0))


def round_bytes(make: MakeTensor, read: ReadTensor) -> torch.Tensor:
    """bfloat16 as bytes: NumPy lacks the type."""
    return make(read).to(torch.bfloat16).view(torch.uint8)


def save_gguf(
    file: Path, tensors: Sequence[OutputTensor], made: Iterable[torch.Tensor], metadata: Mapping[str, str]
) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, "flux")
    for key, value in metadata.items():
        writer.add_string(f"srpo.{key}", value)
    for tensor in tensors:
        quantization = GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in made:
        writer.write_tensor_data(values.contiguous().numpy())
    writer.close()


BF16_WRITER = FormatWriter(list_bf16, save_safetensors)  # bfloat16, diffusers keys
FP8_WRITER = FormatWriter(list_fp8, save_fp8)  # fp8 with a scale a row, diffusers keys
Q4_WRITER = FormatWriter(list_q4, save_gguf)  # 4-bit GGUF (Q4_0), original keys
