"""From a picture's file to RGB pixels of the size to draw, in bounded memory: a few kilobytes can hold 33 megapixels.

Decoding takes at most `source_memory` beyond the picture's own pixels at 3 bytes each. Where it all fits that memory,
the whole picture is decoded, turned upright, laid on white and scaled once. A larger one is shrunk as early as its
format allows: a JPEG while it is decoded, the others in bands, before they are turned and laid on white; their pixels
then differ slightly from what one step would give. What still does not fit is refused. The figures are measured peaks
of Pillow 13, libjpeg-turbo and libwebp.
"""

import struct
import warnings
from typing import BinaryIO

from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from pipelines.fields import Size
from pipelines.image_formats import ANY_TITLE, IMAGE_FORMATS
from pipelines.request import IMAGE_SIZE

MAX_PIXELS = 2**25  # checked before anything is decoded: 33.5 megapixels, 100 MB as RGB
STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # bytes that Pillow keeps a pixel in, of its modes; 4 of all others
WEBP_BYTES = 16  # a pixel: two canvases of libwebp's, the frame as bytes, and Pillow's own
COEFFICIENT = 2  # bytes: libjpeg holds all of them, of each component, where a picture comes in several scans
BAND = 2**20  # pixels
START_OF_SCAN = b"\xff\xda"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what makes a picture of this EXIF orientation upright
SIDEWAYS = (5, 6, 7, 8)
ORIENTATION = 0x0112  # the EXIF tag
PngImagePlugin.MAX_TEXT_MEMORY = PngImagePlugin.MAX_TEXT_CHUNK  # 1 MiB of compressed text, where Pillow reads 64


# What Pillow's readers stumble over: they look into some chunks without asking first how long those are.
DAMAGED = (OSError, SyntaxError, ValueError, LookupError, AssertionError, TypeError, EOFError, struct.error)


class UnusableImage(Exception):
    """The picture cannot be used; the message is for the client."""


def decode(file: BinaryIO, memory: int) -> tuple[Size, bytes]:
    """The size to draw, and the picture as 8-bit RGB pixels of that size: its first frame, upright.

    Blocks. Takes at most `memory` bytes beyond those pixels of the picture's own size. Raises `UnusableImage`.
    """
    file.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"):
            size, flat = read_upright(file, memory)
    except UnidentifiedImageError:
        raise UnusableImage(f"it is not a {ANY_TITLE} picture") from None
    except Image.DecompressionBombError:  # Pillow also raises it, for its own, higher limit
        raise UnusableImage(f"it has more than {MAX_PIXELS:,} pixels") from None
    except DAMAGED:
        raise UnusableImage("it is damaged") from None
    return size, ImageOps.fit(flat, size, Image.Resampling.LANCZOS).tobytes()


def read_upright(file: BinaryIO, memory: int) -> tuple[Size, Image.Image]:
    """The size to draw, and the picture as RGB, upright, of its own size or shrunk."""
    with Image.open(file, formats=tuple(IMAGE_FORMATS)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        if estimate_shrunk_decode(image, file) > memory + 3 * image.width * image.height:
            pixels = f"{image.width * image.height:,} pixels"
            raise UnusableImage(f"reading its {pixels} as {image.format} takes too much memory: make it smaller")
        turn = read_orientation(image)
        upright = image.size[::-1] if turn in SIDEWAYS else image.size
        size = IMAGE_SIZE.nearest(*upright)  # what is longer than 3:1 is cropped at the ends
        if estimate_full_decode(image, size, turned=turn in TURNS) <= memory:
            image.load()
            if turn not in TURNS:
                return size, flatten_on_white(image)
            turned = image.transpose(TURNS[turn])
            image.close()  # one copy is enough
            return size, flatten_on_white(turned)
        flat = shrink(image, size[::-1] if turn in SIDEWAYS else size)
        return size, flat.transpose(TURNS[turn]) if turn in TURNS else flat


def read_orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, if the picture has one. EXIF that is broken says nothing, and is no fault of the pixels."""
    if image.format == "PNG":
        image.load()  # EXIF may come behind the pixels; what is broken in them is a fault
    try:
        turn = image.getexif().get(ORIENTATION)
    except (struct.error, SyntaxError, KeyError, TypeError, ValueError):
        return None
    return turn if isinstance(turn, int) else None


def estimate_full_decode(image: Image.Image, size: Size, *, turned: bool) -> int:
    """Bytes at the peak where the whole picture is decoded, turned, laid on white and scaled."""
    stored = STORED.get(image.mode, 4)
    transparent = image.has_transparency_data
    copied = image.mode != ("RGBA" if transparent else "RGB")
    flattening = (4 if copied else 0) + (5 if transparent else 0)  # 5: the white ground, and the mask
    decoding = WEBP_BYTES if image.format == "WEBP" else stored
    scaling = 4 * (size.width * max(image.size) + 2 * size.width * size.height)
    a_pixel = max(decoding, 2 * stored if turned else 0, stored + flattening)
    return image.width * image.height * a_pixel + scaling


def estimate_shrunk_decode(image: Image.Image, file: BinaryIO) -> int:
    """Bytes at the peak of decoding alone, at full size; what is made of it then is smaller."""
    pixels = image.width * image.height
    if image.format == "WEBP":
        return pixels * WEBP_BYTES
    if isinstance(image, JpegImagePlugin.JpegImageFile) and has_several_scans(image, file):
        largest = max(across * down for _, across, down, _ in image.layer)
        if not largest:
            raise UnusableImage("it is damaged")
        half = pixels  # 4 bytes each, at half the sides
        return half + pixels * COEFFICIENT * sum(across * down for _, across, down, _ in image.layer) // largest
    return pixels * STORED.get(image.mode, 4)


def has_several_scans(image: JpegImagePlugin.JpegImageFile, file: BinaryIO) -> bool:
    """Whether libjpeg keeps all coefficients: the scan whose header Pillow has just read is not the only one."""
    if "progressive" in image.info:
        return True
    length = 8 + 2 * image.layers  # of a header that names all components
    place = file.tell()
    file.seek(place - length)
    header = file.read(length)
    return header[:2] != START_OF_SCAN or header[4] != image.layers


def shrink(image: Image.Image, size: Size | tuple[int, int]) -> Image.Image:
    """The picture on white, in a fraction of its size that is at least `size`, where it is larger than that.

    `size` is as the file has it, not upright. Ends that will be cropped are left out where they are most of it.
    """
    image.draft("RGB", size)  # a JPEG is decoded at an eighth, a quarter or half its size; others stay as they are
    image.load()
    vars(image).pop("_decoder", None)  # libwebp's canvases, which Pillow would keep
    width, height = size
    factor = max(1, min(image.width // width, image.height // height))
    if factor == 1 and image.mode == "RGB" and not image.has_transparency_data:
        return image
    left, top, right, bottom = 0, 0, *image.size
    across, down = min(right, bottom * width // height), min(bottom, right * height // width)
    if 2 * across * down < right * bottom:
        left, top = (right - across) // 2, (bottom - down) // 2
        right, bottom = left + across, top + down
    rows = max(1, BAND // ((right - left) * factor)) * factor
    small = Image.new("RGB", (-(-(right - left) // factor), -(-(bottom - top) // factor)))
    for row in range(top, bottom, rows):
        band = flatten_on_white(image.crop((left, row, right, min(row + rows, bottom))))
        small.paste(band.reduce(factor), (0, (row - top) // factor))
    return small


def flatten_on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB; transparent parts become white, as on a web page."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    ground = Image.new("RGB", layer.size, "white")
    ground.paste(layer, mask=layer.getchannel("A"))
    return ground
