"""The source picture of image-to-image: loads what the client sent or named as RGB pixels of the size to draw."""

import asyncio
import base64
import binascii
import io
import warnings
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.fields import Size
from pipelines.request import IMAGE_SIZE
from server.images.fetch import Unfetchable, fetch
from server.threads import ThreadPools

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_DATA_URI = 10 * 2**20  # characters
FILES = 8  # in memory at once
MAX_PIXELS = 2**25  # checked before anything is decoded: 33.5 megapixels, 100 MB as RGB


class UnusableImage(Exception):
    """The picture cannot be used; the message is for the client."""


class Sources:
    """Loads source pictures, a few at a time: one can take 50 MiB as a file, and 300 MB while it is decoded."""

    def __init__(self, pools: ThreadPools, *, may_fetch: bool) -> None:
        self._pools = pools
        self._may_fetch = may_fetch
        self._files = asyncio.Semaphore(FILES)

    async def load(self, picture: str | bytes | BinaryIO) -> tuple[Size, bytes]:
        """The size to draw, and the picture as RGB pixels of that size. `picture` is a URL, bytes or a file.

        Raises `UnusableImage`.
        """
        async with self._files:
            data = await read_url(picture, self._may_fetch, self._pools) if isinstance(picture, str) else picture
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            return await self._pools.run("decoding", decode, file)


async def read_url(url: str, may_fetch: bool, pools: ThreadPools) -> bytes:
    """The bytes at an https or http URL, or in a data URI. Raises `UnusableImage`."""
    if url[:5].lower() == "data:":
        return read_data_uri(url)
    if not may_fetch:
        raise UnusableImage("this server fetches nothing (--no-fetch): send the picture as a data URI")
    try:
        return await fetch(url, pools)
    except Unfetchable as error:
        raise UnusableImage(str(error)) from error


def read_data_uri(url: str) -> bytes:
    head, _, data = url.partition(",")
    if len(url) > MAX_DATA_URI:
        raise UnusableImage(f"the data URI is larger than {MAX_DATA_URI >> 20} MiB")
    if not head.lower().endswith(";base64"):
        raise UnusableImage("the data URI is not base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise UnusableImage("the data URI is not base64") from None


def decode(file: BinaryIO) -> tuple[Size, bytes]:
    """The size to draw, and the picture as 8-bit RGB pixels of that size: its first frame, upright.

    Blocks. Raises `UnusableImage`.
    """
    file.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            ImageOps.exif_transpose(image, in_place=True)
            flat = flatten_on_white(image)
    except UnidentifiedImageError:
        raise UnusableImage("it is not a PNG, JPEG or WebP picture") from None
    except Image.DecompressionBombError:  # Pillow also raises it, for its own, higher limit
        raise UnusableImage(f"it has more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError):
        raise UnusableImage("it is damaged") from None
    size = IMAGE_SIZE.nearest(flat.width, flat.height)  # what is longer than 3:1 is cropped at the ends
    return size, ImageOps.fit(flat, size, Image.Resampling.LANCZOS).tobytes()


def flatten_on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB; transparent parts become white, as on a web page."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    ground = Image.new("RGB", layer.size, "white")
    ground.paste(layer, mask=layer.getchannel("A"))
    return ground
