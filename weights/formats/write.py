"""The formats that `srpo weights convert` writes: one row of `OUTPUT_FORMATS` each. Imports torch.

A format first plans every tensor it will store (name, type, shape), so that the header can be written before the first
tensor is converted, and the file from front to back.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    tensor_shapes,
)
from weights.formats.read import byte_view

FP8 = torch.float8_e4m3fn
FP8_ROWS = "srpo-fp8-rows"
BLOCK = 32  # numbers that share a scale in GGUF's Q4_0 and Q8_0
Q4_BYTES = 18  # a block of 32: a float16 scale and 16 bytes
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3"}
ReadTensor = Callable[[str], torch.Tensor]
FilePlan = Mapping[str, "PlannedTensor"]
NamedTensor = tuple[str, torch.Tensor]


class PlannedTensor(NamedTuple):
    """A tensor of the new file: the container's name of its type, its shape, and its size in bytes."""

    dtype: str
    shape: Shape
    size: int


class OutputFormat(NamedTuple):
    """One format: its title, what it will store, the converted tensors in that order, and what writes the file."""

    title: str
    plan: Callable[[TransformerConfig], FilePlan]
    convert: Callable[[TransformerConfig, ReadTensor], Iterator[NamedTensor]]
    save: Callable[[Path, FilePlan, Iterable[NamedTensor], Mapping[str, str]], None]


def plan_tensor(dtype: torch.dtype, shape: Shape) -> PlannedTensor:
    return PlannedTensor(DTYPE_NAMES[dtype], shape, prod(shape) * dtype.itemsize)


def plan_bf16(config: TransformerConfig) -> FilePlan:
    return {name: plan_tensor(torch.bfloat16, shape) for name, shape in tensor_shapes(config).items()}


def convert_bf16(config: TransformerConfig, read: ReadTensor) -> Iterator[NamedTensor]:
    for name in tensor_shapes(config):
        yield name, read(name).to(torch.bfloat16)


def plan_fp8(config: TransformerConfig) -> FilePlan:
    """The blocks' attention and MLP matrices in fp8 with a float32 scale for each row; all else in bfloat16."""
    plan: dict[str, PlannedTensor] = {}
    for name, shape in tensor_shapes(config).items():
        if BLOCK_LINEARS.fullmatch(name):
            plan[f"{name}_scale"] = plan_tensor(torch.float32, (shape[0], 1))
            plan[name] = plan_tensor(FP8, shape)
        else:
            plan[name] = plan_tensor(torch.bfloat16, shape)
    return plan


def convert_fp8(config: TransformerConfig, read: ReadTensor) -> Iterator[NamedTensor]:
    for name in tensor_shapes(config):
        if BLOCK_LINEARS.fullmatch(name):
            values, scale = quantize_rows(read(name))
            yield f"{name}_scale", scale
            yield name, values
        else:
            yield name, read(name).to(torch.bfloat16)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in fp8 and their float32 scales `(rows, 1)`. The product is the weight, each value to within 1/16."""
    weight = weight.float()
    largest = torch.finfo(FP8).max
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
    return (weight / scale).clamp(-largest, largest).to(FP8), scale


def save_safetensors(file: Path, plan: FilePlan, tensors: Iterable[NamedTensor], metadata: Mapping[str, str]) -> None:
    """Written by hand: the safetensors library wants all tensors in memory at once. The header is a length and JSON."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, planned in plan.items():
        offsets = [offset, offset := offset + planned.size]
        entries[name] = {"dtype": planned.dtype, "shape": planned.shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as output:
        output.write(len(header).to_bytes(8, "little") + header)
        for _, tensor in tensors:
            output.write(byte_view(tensor.contiguous()))


def save_fp8(file: Path, plan: FilePlan, tensors: Iterable[NamedTensor], metadata: Mapping[str, str]) -> None:
    save_safetensors(file, plan, tensors, {"layout": FP8_ROWS, **metadata})


def plan_q4(config: TransformerConfig) -> FilePlan:
    """GGUF with the original keys, for ComfyUI and diffusers: the blocks' matrices in Q4_0, vectors in float32."""
    shapes, plan = tensor_shapes(config), {}
    for name, parts in original_to_diffusers(config).items():
        shape = (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
        if all(BLOCK_LINEARS.fullmatch(part) for part in parts) and shape[1] % BLOCK == 0:
            plan[name] = PlannedTensor("Q4_0", shape, prod(shape) // BLOCK * Q4_BYTES)
        elif len(shape) == 1:
            plan[name] = plan_tensor(torch.float32, shape)
        else:
            plan[name] = plan_tensor(torch.bfloat16, shape)
    return plan


def convert_q4(config: TransformerConfig, read: ReadTensor) -> Iterator[NamedTensor]:
    from gguf import GGMLQuantizationType, quants

    plan = plan_q4(config)
    for name, parts in original_to_diffusers(config).items():
        rows = torch.cat([read(part).float() for part in parts])
        if name.startswith(SWAPPED_HALVES):
            rows = torch.cat(rows.chunk(2)[::-1])
        match plan[name].dtype:
            case "Q4_0":
                yield name, torch.from_numpy(quants.quantize(rows.numpy(), GGMLQuantizationType.Q4_0))
            case "F32":
                yield name, rows
            case _:
                yield name, rows.to(torch.bfloat16).view(torch.uint8)


def save_gguf(file: Path, plan: FilePlan, tensors: Iterable[NamedTensor], metadata: Mapping[str, str]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, "flux")
    for key, value in metadata.items():
        writer.add_string(f"srpo.{key}", value)
    for name, planned in plan.items():
        quantization = GGMLQuantizationType[planned.dtype]
        writer.add_tensor_info(name, planned.shape, np.dtype(np.float32), planned.size, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors:
        writer.write_tensor_data(tensor.contiguous().numpy())
    writer.close()


OUTPUT_FORMATS: Mapping[str, OutputFormat] = {
    "bf16": OutputFormat("bfloat16, diffusers keys", plan_bf16, convert_bf16, save_safetensors),
    "fp8": OutputFormat("fp8 with a scale a row, diffusers keys", plan_fp8, convert_fp8, save_fp8),
    "q4": OutputFormat("4-bit GGUF (Q4_0), original keys", plan_q4, convert_q4, save_gguf),
}
