"""Requests that a model cannot draw as they are: sizes and guidance scales that it has not learned.

FLUX.1 draws every size that the API allows. Another model may have learned pictures of about one size only, its canvas.
It draws a picture of the requested shape whose short side is as long as that of the canvas. The canvas lies in its
middle, and the picture goes on beyond it at both ends of the long side. The picture is then enlarged to the requested
size, and what is left over at the two ends is cut off.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from pipelines.fields import Size
from pipelines.request import ImageRequest

Range = tuple[float, float]
LOST = 0.02  # of the picture's short side, what may be cut off for a shorter window


@dataclass(frozen=True, slots=True)
class CanvasFit:
    """The request as the model draws it, the requested size, and notes for the client."""

    request: ImageRequest
    size: Size
    notes: tuple[str, ...]

    @property
    def drawn(self) -> Size:
        return Size(self.request.width, self.request.height)


def fit_canvas(request: ImageRequest, canvas: Size | None, token_pixels: int, guidance: Range | None) -> CanvasFit:
    """`canvas` is the size around which the model has learned, `guidance` the scales; None for all of them.

    `token_pixels` are those of a token's side.
    """
    size, notes = Size(request.width, request.height), list[str]()
    if canvas is not None:
        drawn = choose_window(size, canvas, token_pixels)
        source = request.source and replace(request.source, pixels=extend(request.source.pixels, size, drawn))
        request = replace(request, width=drawn.width, height=drawn.height, source=source)
    scale = request.guidance_scale
    if guidance is not None and not guidance[0] <= scale <= guidance[1]:
        scale = min(max(scale, guidance[0]), guidance[1])
        notes.append(f"guidance_scale: this model knows {guidance[0]:g} to {guidance[1]:g}; {scale:g} was used")
        request = replace(request, guidance_scale=scale)
    return CanvasFit(request, size, tuple(notes))


def choose_window(size: Size, canvas: Size, token_pixels: int) -> Size:
    """The smallest window in which a picture of the shape of `size` is, or nearly: as short as the canvas, and with
    equally many tokens on both sides of it.
    """
    shape, step = (size.width / size.height) / (canvas.width / canvas.height), 2 * token_pixels

    def lengthen(least: int, times: float) -> int:
        return least + step * max(0, math.ceil((times * (1 - LOST) - 1) * least / step))

    return Size(lengthen(canvas.width, shape), lengthen(canvas.height, 1 / shape))


def count_before(drawn: Size, canvas: Size, token_pixels: int) -> tuple[int, int]:
    """Rows and columns of tokens before the canvas' own."""
    return (drawn.height - canvas.height) // (2 * token_pixels), (drawn.width - canvas.width) // (2 * token_pixels)


def fit_inside(drawn: Size, size: Size) -> Size:
    """The largest size of the shape of `drawn` within `size`."""
    scale = min(size.width / drawn.width, size.height / drawn.height)
    return Size(round(drawn.width * scale), round(drawn.height * scale))


def enlarge(pixels: bytes, drawn: Size, size: Size) -> bytes:
    """8-bit RGB of `drawn` as 8-bit RGB of `size`: scaled, and cut to its shape at both ends."""
    if drawn == size:
        return pixels
    scale = min(drawn.width / size.width, drawn.height / size.height)
    left, top = (drawn.width - scale * size.width) / 2, (drawn.height - scale * size.height) / 2
    box = (left, top, drawn.width - left, drawn.height - top)
    return Image.frombytes("RGB", drawn, pixels).resize(size, Image.Resampling.LANCZOS, box).tobytes()


def extend(pixels: bytes, size: Size, drawn: Size) -> bytes:
    """8-bit RGB of `size` as 8-bit RGB of `drawn`, whose middle it is in `enlarge`; its edges are drawn out."""
    if drawn == size:
        return pixels
    inner = fit_inside(size, drawn)
    picture = np.asarray(Image.frombytes("RGB", size, pixels).resize(inner, Image.Resampling.LANCZOS))
    across, down = drawn.width - inner.width, drawn.height - inner.height
    around = ((down // 2, down - down // 2), (across // 2, across - across // 2), (0, 0))
    return np.pad(picture, around, mode="edge").tobytes()
