"""The forms that `srpo weights convert` writes: one row each. Imports torch.

A row plans every stored tensor (name, type, shape) before the first is made, so that the file can be written from
front to back.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from weights.formats.architecture import LINEARS, SWAPPED, Geometry, Shape, shapes, stacks
from weights.formats.read import bytes_of

FP8 = torch.float8_e4m3fn
ROWS = "srpo-fp8-rows"
BLOCK = 32  # numbers that share a scale in GGUF's Q4_0 and Q8_0
Q4_BYTES = 18  # a block of 32: a float16 scale and 16 bytes
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", FP8: "F8_E4M3"}
Read = Callable[[str], torch.Tensor]
Plan = Mapping[str, "Stored"]
Values = Iterable[tuple[str, torch.Tensor]]


class Stored(NamedTuple):
    """A tensor of the new file: its type's name in the container, its shape, its size in bytes."""

    dtype: str
    shape: Shape
    size: int


class Layout(NamedTuple):
    """A row: what it is, what will be stored, the tensors in that order, and what writes them."""

    title: str
    plan: Callable[[Geometry], Plan]
    make: Callable[[Geometry, Read], Iterator[tuple[str, torch.Tensor]]]
    save: Callable[[Path, Plan, Values, Mapping[str, str]], None]


def stored(dtype: torch.dtype, shape: Shape) -> Stored:
    return Stored(NAMES[dtype], shape, prod(shape) * dtype.itemsize)


def plan_bf16(geometry: Geometry) -> Plan:
    return {name: stored(torch.bfloat16, shape) for name, shape in shapes(geometry).items()}


def make_bf16(geometry: Geometry, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    for name in shapes(geometry):
        yield name, read(name).to(torch.bfloat16)


def plan_fp8(geometry: Geometry) -> Plan:
    """The blocks' attention and MLP matrices in fp8 with a float32 scale a row; all else in bfloat16."""
    plan: dict[str, Stored] = {}
    for name, shape in shapes(geometry).items():
        if LINEARS.fullmatch(name):
            plan[f"{name}_scale"] = stored(torch.float32, (shape[0], 1))
            plan[name] = stored(FP8, shape)
        else:
            plan[name] = stored(torch.bfloat16, shape)
    return plan


def make_fp8(geometry: Geometry, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    for name in shapes(geometry):
        if LINEARS.fullmatch(name):
            values, scale = quantized(read(name))
            yield f"{name}_scale", scale
            yield name, values
        else:
            yield name, read(name).to(torch.bfloat16)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in fp8, and float32 scales `(rows, 1)`; their product is the weight, to within 1/16 of each value."""
    weight = weight.float()
    largest = torch.finfo(FP8).max
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
    return (weight / scale).clamp(-largest, largest).to(FP8), scale


def save_safetensors(file: Path, plan: Plan, values: Values, metadata: Mapping[str, str]) -> None:
    """The format's own writer wants all tensors at once; its header is a length and JSON."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, tensor in plan.items():
        offsets = [offset, offset := offset + tensor.size]
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as output:
        output.write(len(header).to_bytes(8, "little") + header)
        for _, made in values:
            output.write(bytes_of(made.contiguous()))


def save_fp8(file: Path, plan: Plan, values: Values, metadata: Mapping[str, str]) -> None:
    save_safetensors(file, plan, values, {"layout": ROWS, **metadata})


def plan_q4(geometry: Geometry) -> Plan:
    """GGUF in the original keys, as ComfyUI and diffusers read it: the blocks' matrices in Q4_0, vectors in float32."""
    ours, plan = shapes(geometry), {}
    for name, stack in stacks(geometry).items():
        shape = (sum(ours[part][0] for part in stack), *ours[stack[0]][1:])
        if all(LINEARS.fullmatch(part) for part in stack) and shape[1] % BLOCK == 0:
            plan[name] = Stored("Q4_0", shape, prod(shape) // BLOCK * Q4_BYTES)
        elif len(shape) == 1:
            plan[name] = stored(torch.float32, shape)
        else:
            plan[name] = stored(torch.bfloat16, shape)
    return plan


def make_q4(geometry: Geometry, read: Read) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import GGMLQuantizationType, quants

    plan = plan_q4(geometry)
    for name, stack in stacks(geometry).items():
        rows = torch.cat([read(part).float() for part in stack])
        if name.startswith(SWAPPED):
            rows = torch.cat(rows.chunk(2)[::-1])
        match plan[name].dtype:
            case "Q4_0":
                yield name, torch.from_numpy(quants.quantize(rows.numpy(), GGMLQuantizationType.Q4_0))
            case "F32":
                yield name, rows
            case _:
                yield name, rows.to(torch.bfloat16).view(torch.uint8)


def save_gguf(file: Path, plan: Plan, values: Values, metadata: Mapping[str, str]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, "flux")
    for key, value in metadata.items():
        writer.add_string(f"srpo.{key}", value)
    for name, tensor in plan.items():
        kind = GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, made in values:
        writer.write_tensor_data(made.contiguous().numpy())
    writer.close()


LAYOUTS: Mapping[str, Layout] = {
    "bf16": Layout("bfloat16, diffusers keys", plan_bf16, make_bf16, save_safetensors),
    "fp8": Layout("fp8 with a scale a row, diffusers keys", plan_fp8, make_fp8, save_fp8),
    "q4": Layout("4-bit GGUF (Q4_0), original keys", plan_q4, make_q4, save_gguf),
}
