"""The source picture of image-to-image: loads what the client sent or named as RGB pixels of the size to draw."""

import asyncio
import base64
import binascii
import io
from typing import BinaryIO
from urllib.parse import unquote

from pipelines.fields import Size
from server.images.decoding import UnusableImage, decode
from server.images.fetch import Unfetchable, fetch
from server.process.threads import ThreadPools
from server.settings.limits import SOURCE_MEMORY

MAX_DATA_URI = 10 * 2**20  # characters
FILES = 8  # in memory at once
FETCHES = 8  # the same of those from URLs, which may be slow, and must not keep others' uploads waiting


class Sources:
    """Loads source pictures, a few at a time: one can take 50 MiB as a file. They are decoded one after the other.

    `memory` is what decoding may take, in bytes, as `decode` has it.
    """

    def __init__(self, threads: ThreadPools, *, may_fetch: bool, memory: int = SOURCE_MEMORY) -> None:
        self._threads = threads
        self._may_fetch = may_fetch
        self._memory = memory
        self._files = asyncio.Semaphore(FILES)
        self._fetched = asyncio.Semaphore(FETCHES)

    async def load(self, picture: str | bytes | BinaryIO) -> tuple[Size, bytes]:
        """The size to draw, and the picture as RGB pixels of that size. `picture` is a URL, bytes or a file.

        Raises `UnusableImage`.
        """
        if isinstance(picture, str) and picture[:5].lower() != "data:":
            async with self._fetched:
                return await self._decode(await read_url(picture, self._may_fetch, self._threads))
        return await self._decode(picture)

    async def _decode(self, picture: str | bytes | BinaryIO) -> tuple[Size, bytes]:
        """`picture`: a data URI, bytes or a file."""
        async with self._files:
            data = await read_url(picture, self._may_fetch, self._threads) if isinstance(picture, str) else picture
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            return await self._threads.run("decoding", decode, file, self._memory)


async def read_url(url: str, may_fetch: bool, threads: ThreadPools) -> bytes:
    """The bytes at an https or http URL, or in a data URI. Raises `UnusableImage`."""
    if url[:5].lower() == "data:":
        return await threads.run("bodies", read_data_uri, url)
    if not may_fetch:
        raise UnusableImage("this server fetches nothing (--no-fetch): send the picture as a data URI")
    try:
        return await fetch(url, threads)
    except Unfetchable as error:
        raise UnusableImage(str(error)) from error


def read_data_uri(url: str) -> bytes:
    """The bytes in a base64 data URI, read as browsers do: white space and missing padding are no fault."""
    head, _, data = url.partition(",")
    if len(url) > MAX_DATA_URI:
        raise UnusableImage(f"the data URI is larger than {MAX_DATA_URI >> 20} MiB")
    if not head.lower().endswith(";base64"):
        raise UnusableImage("the data URI is not base64")
    data = "".join((unquote(data) if "%" in data else data).split())
    try:
        return base64.b64decode(data.rstrip("=") + "=" * (-len(data.rstrip("=")) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UnusableImage("the data URI is not base64") from None
