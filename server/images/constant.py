"""Images all of one colour: seldom what somebody asked for, often a fault of weights, precision or the device."""

from dataclasses import replace

import structlog

from pipelines.errors import ConstantImage
from pipelines.request import ImageResult

PIXEL = 3  # bytes
SAMPLE = 64 * PIXEL  # bytes at the beginning of an image, which tell of most that they are not
log = structlog.get_logger("srpo")


class ConstantImages:
    """Counts them. `refuse`: a request with one of them fails."""

    def __init__(self, refuse: bool) -> None:
        self._refuse = refuse
        self.count = 0

    def check(self, result: ImageResult) -> ImageResult:
        """The result as the model drew it, with a note for each such image. Raises `ConstantImage`."""
        found = [index for index, pixels in enumerate(result.pixels) if is_constant(pixels)]
        if not found:
            return result
        self.count += len(found)
        log.warning("constant_image", images=found, seeds=[result.request.seeds[index] for index in found])
        if self._refuse:
            raise ConstantImage
        notes = tuple(f"image {index} is all of one colour" for index in found)
        return replace(result, notes=result.notes + notes)


def is_constant(pixels: bytes) -> bool:
    """Whether all pixels of 8-bit RGB are the same."""
    first = pixels[:PIXEL]
    return all(part == first * (len(part) // PIXEL) for part in (pixels[:SAMPLE], pixels))
