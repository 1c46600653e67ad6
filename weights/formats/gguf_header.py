"""The header of a GGUF file, read with the format's own library. No torch."""

from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.gguf_reader import ReaderField

from weights.errors import WrongWeights
from weights.formats.headers import Header, Tensor


class _Reader(GGUFReader):  # type: ignore[misc]
    """Lists the tensors without touching their data: a file that was cut off is then told by its size."""

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        self.listed: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for entry in fields:
            _, name, _, dimensions, kind, offset = entry.parts
            shape = tuple(int(side) for side in reversed(dimensions.tolist()))
            dtype = GGMLQuantizationType(kind[0])
            block, size = GGML_QUANT_SIZES[dtype]
            elements = 1
            for side in shape:
                elements *= side
            self.listed[bytes(name).decode()] = (
                dtype.name,
                shape,
                start_offs + int(offset[0]),
                elements // block * size,
            )


def read_gguf(path: Path) -> Header:
    """Raises `WrongWeights`."""
    size = path.stat().st_size
    try:
        reader = _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise WrongWeights(path, f"its GGUF header is damaged or cut off, at {size:,} bytes ({error})") from error
    tensors = {
        name: Tensor(dtype, shape, path, start, length) for name, (dtype, shape, start, length) in reader.listed.items()
    }
    expected = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if size < expected:
        raise WrongWeights(path, f"cut off: expected {expected:,} bytes, got {size:,}")
    return Header(path, "gguf", tensors, {})
