"""Reads the header of a weights file or folder: the names, types and shapes of its tensors. No torch.

A file is recognized by its content. A pickle file is refused before anything could run it, and a file that was cut off
is an error that says which size it should have.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from weights.errors import UnsafeFile, WrongWeights
from weights.formats.tensors import Header, TensorInfo

MAX_HEADER_BYTES = 100_000_000  # bytes; safetensors' own bound
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16}
BITS |= {"I8": 8, "U8": 8, "BOOL": 8}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def read_header(path: Path) -> Header:
    """The header of a file, a transformer's folder or a pipeline's folder. Raises `UnsafeFile` or `WrongWeights`."""
    if path.is_dir():
        return _read_folder(path / "transformer" if (path / "model_index.json").exists() else path)
    if not path.exists():
        raise WrongWeights(path, "there is no such file")
    reject_unsafe_file(path)
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            from weights.formats.gguf_header import (
                read_gguf_header,  # gguf imports numpy, which the HTTP process avoids
            )

            return read_gguf_header(path)
    return _read_safetensors(path)


def reject_unsafe_file(path: Path) -> None:
    """Raises `UnsafeFile` for a pickle file, whatever its name is, and for a file that is no weights file at all."""
    with path.open("rb") as file:
        first = file.read(512)
    named_for_pickle = path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    if _begins_like_safetensors(first) and not named_for_pickle:
        return  # the length of its header may be 0x0280, and look like a pickle, or 0x3c20, and look like a page
    if first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05") or _is_tar(first):
        raise UnsafeFile(path, "a pickle file (torch.save). Loading one runs code in it, so it is never read")
    if named_for_pickle:
        raise UnsafeFile(path, "named like a pickle file, and never read. Only safetensors and GGUF files are")
    if first.startswith(b"version https://git-lfs"):
        raise UnsafeFile(path, "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`, or download it")
    if first.lstrip()[:1] == b"<":
        raise UnsafeFile(path, "a web page, not weights: the download was answered with a page (is the model gated?)")


def _begins_like_safetensors(first: bytes) -> bool:
    """Whether a length that can be a header's is followed by the beginning of one."""
    return 2 <= int.from_bytes(first[:8], "little") <= MAX_HEADER_BYTES and first[8:9] == b"{"


def _is_tar(first: bytes) -> bool:
    return first[257:262] == b"ustar"


def _read_safetensors(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES or file.read(1) != b"{":
            raise WrongWeights(path, "neither a safetensors nor a GGUF file")
        if size < 8 + length:
            raise WrongWeights(path, f"cut off: expected at least {8 + length:,} bytes, got {size:,}")
        file.seek(8)
        try:
            entries = json.loads(file.read(length))
            metadata = entries.pop("__metadata__", None) or {}
            tensors = {name: _parse_tensor(path, 8 + length, entry) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WrongWeights(path, f"its header is damaged ({error})") from error
    expected = max((tensor.start + tensor.size for tensor in tensors.values()), default=8 + length)
    if size != expected:
        what = "cut off" if size < expected else "longer than its header says"
        raise WrongWeights(path, f"{what}: expected {expected:,} bytes, got {size:,}")
    return Header(path, "safetensors", tensors, metadata)


def _parse_tensor(path: Path, data_start: int, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = (int(place) for place in entry["data_offsets"])
    shape = tuple(int(side) for side in entry["shape"])
    bits = BITS.get(entry["dtype"])
    if begin < 0 or min(shape, default=0) < 0 or (bits and end - begin != prod(shape) * bits // 8):
        raise ValueError(f"{entry['dtype']} {list(shape)} cannot lie in bytes {begin} to {end}")
    return TensorInfo(entry["dtype"], shape, path, data_start + begin, end - begin)


def _read_folder(folder: Path) -> Header:
    """A transformer's folder in diffusers layout: one file, or shards with their index."""
    config = folder / "config.json"
    if not config.is_file():
        raise WrongWeights(folder, "not a diffusers folder: it has no config.json")
    index = folder / INDEX
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
        transformer_config = json.loads(config.read_text())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrongWeights(folder, f"its config.json or index cannot be read ({error})") from error
    files = [folder / Path(shard).name for shard in shards] or sorted(folder.glob("*.safetensors"))
    if missing := [file for file in files if not file.is_file()]:
        raise WrongWeights(missing[0], f"missing: one of the {len(files)} files that {INDEX} names")
    if not files:
        for file in sorted(folder.glob("*.bin")):
            reject_unsafe_file(file)
        raise WrongWeights(folder, "it holds no safetensors file")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        reject_unsafe_file(file)
        tensors |= _read_safetensors(file).tensors
    return Header(folder, "safetensors", tensors, {}, folder=True, config=transformer_config)
