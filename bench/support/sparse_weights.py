"""Safetensors files of zeros that take no space on the disk: real shapes without real weights; some get values."""

import json
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path

import torch


def write_sparse(path: Path, shapes: Mapping[str, Sequence[int]], dtype: str, item_size: int) -> int:
    """Write the file; returns its logical size in bytes. `item_size` is that of one value of `dtype`, in bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + item_size * prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return path.stat().st_size


def fill_random(path: Path, names: Collection[str] = ()) -> None:
    """Give these tensors of a bfloat16 file (none named: all) values that keep what passes through at its size."""
    generator = torch.Generator().manual_seed(7)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        for name, entry in entries.items():
            if name == "__metadata__" or (names and name not in names):
                continue
            shape = entry["shape"]
            values = torch.randn(shape, generator=generator)
            if len(shape) == 1:  # a bias, or the factors of a norm
                values = 0.1 * values + name.endswith("weight")
            else:
                values *= prod(shape[1:]) ** -0.5
            file.seek(8 + length + entry["data_offsets"][0])
            file.write(values.bfloat16().view(torch.uint8).numpy().tobytes())
