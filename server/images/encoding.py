"""Encodes pixels as an image file. The same pixels give the same bytes, unless the file is signed."""

import base64
import io
from dataclasses import dataclass, replace

from PIL import Image

from pipelines.image_formats import IMAGE_FORMATS
from pipelines.safety.guard import InspectedResult
from server.images.metadata import WITHHELD, format_parameters, make_save_options
from server.images.signing import FileSigner
from server.settings.engine import EngineSettings


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A finished image file."""

    data: bytes
    format: str
    width: int
    height: int

    @property
    def content_type(self) -> str:
        return IMAGE_FORMATS[self.format].content_type

    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")


def encode_one(
    inspected: InspectedResult, index: int, format: str, settings: EngineSettings, signer: FileSigner | None
) -> EncodedImage:
    """Image `index` as a file with its marks. If it was withheld, the file says so instead of giving parameters."""
    result = inspected.result
    parameters = None if settings.omit_parameters else format_parameters(result.request, index)
    text = WITHHELD if inspected.withheld[index] else parameters
    size = (result.request.width, result.request.height)
    image = encode(result.pixels[index], *size, format, settings.jpeg_quality, text)
    if signer is None or inspected.withheld[index]:  # a withheld image is not what the model drew
        return image
    return replace(image, data=signer.sign(image.data, image.content_type, result.request.model))


def encode(
    pixels: bytes, width: int, height: int, format: str, quality: int, parameters: str | None = None
) -> EncodedImage:
    """Encode 8-bit RGB `pixels`, `width * height * 3` bytes, row-major. `quality` is of lossy formats, 1 to 100.

    The mark that a model made the image is always in the file; `parameters` is a text beside it.
    """
    row = IMAGE_FORMATS[format]
    options = {**row.save_options, **make_save_options(row, parameters)}
    if row.lossy:
        options["quality"] = quality
    out = io.BytesIO()
    picture = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    picture.save(out, format, **options)
    return EncodedImage(out.getvalue(), format, width, height)
