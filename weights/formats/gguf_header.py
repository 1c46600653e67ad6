"""The header of a GGUF file, read with the format's own library. No torch."""

from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.gguf_reader import ReaderField

from weights.errors import WrongWeights
from weights.formats.tensors import Header, TensorInfo


class HeaderReader(GGUFReader):  # type: ignore[misc]
    """Lists the tensors without mapping their data, so that a truncated file is recognized by its size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.infos: dict[str, TensorInfo] = {}
        super().__init__(path)

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for tensor in fields:
            _, name, _, dimensions, kind, offset = tensor.parts
            shape = tuple(int(side) for side in reversed(dimensions.tolist()))
            dtype = GGMLQuantizationType(kind[0])
            block, block_bytes = GGML_QUANT_SIZES[dtype]
            size = prod(shape) // block * block_bytes
            self.infos[bytes(name).decode()] = TensorInfo(
                dtype.name, shape, self._path, start_offs + int(offset[0]), size
            )


def read_gguf_header(path: Path) -> Header:
    """Raises `WrongWeights` for a header that is damaged, and for a file shorter than its header says."""
    size = path.stat().st_size
    try:
        tensors = HeaderReader(path).infos
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise WrongWeights(path, f"its GGUF header is damaged or cut off, at {size:,} bytes ({error})") from error
    expected = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if size < expected:
        raise WrongWeights(path, f"cut off: expected {expected:,} bytes, got {size:,}")
    return Header(path, "gguf", tensors, {})
