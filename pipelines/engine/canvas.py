"""Requests that a model cannot draw as they are: sizes and guidance scales that it has not learned.

FLUX.1 draws every size that the API allows. A model that has learned a single size, its canvas, draws that. The picture
is then enlarged, and its edges are extended to the requested size; on plain backgrounds the seam is invisible.
"""

from dataclasses import dataclass, replace

from PIL import Image

from pipelines.fields import Size
from pipelines.request import ImageRequest

Range = tuple[float, float]
SMOOTH = 8  # values that an edge is averaged to before it is extended: single pixels would leave streaks


@dataclass(frozen=True, slots=True)
class CanvasFit:
    """The request as the model draws it, the requested size, and notes for the client."""

    request: ImageRequest
    size: Size
    notes: tuple[str, ...]

    @property
    def drawn(self) -> Size:
        return Size(self.request.width, self.request.height)


def fit_canvas(request: ImageRequest, canvas: tuple[int, int] | None, guidance: Range | None) -> CanvasFit:
    """`canvas` is the one size the model has learned, `guidance` the scales; None for all of them."""
    size, notes = Size(request.width, request.height), list[str]()
    if canvas is not None and canvas != size:
        notes.append(
            f"image_size: this model draws {canvas[0]}x{canvas[1]}; the picture was enlarged, its edges drawn out"
        )
        source = request.source and replace(
            request.source, pixels=crop_to_canvas(request.source.pixels, size, Size(*canvas))
        )
        request = replace(request, width=canvas[0], height=canvas[1], source=source)
    scale = request.guidance_scale
    if guidance is not None and not guidance[0] <= scale <= guidance[1]:
        scale = min(max(scale, guidance[0]), guidance[1])
        notes.append(f"guidance_scale: this model knows {guidance[0]:g} to {guidance[1]:g}; {scale:g} was used")
        request = replace(request, guidance_scale=scale)
    return CanvasFit(request, size, tuple(notes))


def fit_inside(drawn: Size, size: Size) -> Size:
    """The largest size of the shape of `drawn` within `size`."""
    scale = min(size.width / drawn.width, size.height / drawn.height)
    return Size(round(drawn.width * scale), round(drawn.height * scale))


def pad_to_size(pixels: bytes, drawn: Size, size: Size) -> bytes:
    """8-bit RGB of `drawn` as 8-bit RGB of `size`: scaled, in the middle, with its edges extended."""
    if drawn == size:
        return pixels
    inner = fit_inside(drawn, size)
    picture = Image.frombytes("RGB", drawn, pixels).resize(inner, Image.Resampling.LANCZOS)
    left, top = (size.width - inner.width) // 2, (size.height - inner.height) // 2
    page = Image.new("RGB", size)
    right, bottom = left + inner.width, top + inner.height
    for edge, place in (
        ((0, 0, 1, inner.height), (0, 0, left, size.height)),
        ((inner.width - 1, 0, inner.width, inner.height), (right, 0, size.width, size.height)),
        ((0, 0, inner.width, 1), (0, 0, size.width, top)),
        ((0, inner.height - 1, inner.width, inner.height), (0, bottom, size.width, size.height)),
    ):
        extent = (place[2] - place[0], place[3] - place[1])
        if min(extent) > 0:
            few = (1, SMOOTH) if edge[2] - edge[0] == 1 else (SMOOTH, 1)
            strip = picture.crop(edge).resize(few, Image.Resampling.BOX).resize(extent, Image.Resampling.BICUBIC)
            page.paste(strip, place[:2])
    page.paste(picture, (left, top))
    return page.tobytes()


def crop_to_canvas(pixels: bytes, size: Size, canvas: Size) -> bytes:
    """The middle of a picture, as `pad_to_size` would have put it there, at the canvas' size."""
    inner = fit_inside(canvas, size)
    left, top = (size.width - inner.width) // 2, (size.height - inner.height) // 2
    box = (left, top, left + inner.width, top + inner.height)
    return Image.frombytes("RGB", size, pixels).resize(canvas, Image.Resampling.LANCZOS, box).tobytes()
