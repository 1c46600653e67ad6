"""From pixels to the bytes of a file. Deterministic: no clock and no ids in the metadata."""

import base64
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

CONTENT_TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A finished image file."""

    data: bytes
    format: str
    width: int
    height: int

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.format]

    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")

    def data_uri(self) -> str:
        return f"data:{self.content_type};base64,{self.base64()}"


def encode(pixels: bytes, width: int, height: int, format: str, quality: int) -> EncodedImage:
    """Encode 8-bit RGB `pixels`, `width * height * 3` bytes, row-major. `quality` is of JPEG and WebP, 1 to 100."""
    options: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": quality, "subsampling": "4:4:4"},
        "png": {"compress_level": 1},  # level 6 takes eight times as long for a few percent
        "webp": {"quality": quality, "method": 2},
    }
    out = io.BytesIO()
    Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1).save(out, format, **options[format])
    return EncodedImage(out.getvalue(), format, width, height)
