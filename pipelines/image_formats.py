"""The formats of image files: a request may ask for any of them, and begin at a picture in any of them.

What decoding one takes in memory is measured: the figures are in `server.images.decoding`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """One format. Its key in `IMAGE_FORMATS` is what requests and Pillow call it, and how files that we name end."""

    title: str  # for people
    content_type: str
    suffixes: tuple[str, ...]  # with which people name such files
    lossy: bool  # is written with a quality, 1 to 100
    save_options: Mapping[str, Any]  # of Pillow's `save`, beside the quality
    text_chunks: bool = False  # what is said of the image is kept in PNG's text chunks; else in EXIF and XMP


IMAGE_FORMATS: Mapping[str, ImageFormat] = {
    "png": ImageFormat(
        "PNG",
        "image/png",
        (".png",),
        lossy=False,
        save_options={"compress_level": 1},  # level 6 takes eight times as long for a few percent
        text_chunks=True,
    ),
    "jpeg": ImageFormat("JPEG", "image/jpeg", (".jpg", ".jpeg"), lossy=True, save_options={"subsampling": "4:4:4"}),
    "webp": ImageFormat("WebP", "image/webp", (".webp",), lossy=True, save_options={"method": 2}),
}
TITLES = ", ".join(row.title for row in IMAGE_FORMATS.values())
ANY_TITLE = " or ".join(TITLES.rsplit(", ", 1))  # PNG, JPEG or WebP
