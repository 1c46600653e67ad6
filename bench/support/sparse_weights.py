"""Safetensors files of zeros that take no space on the disk: real shapes without real weights."""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path


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
