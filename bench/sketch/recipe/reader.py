"""Recognizes what a picture shows: which things, where, in which colour, on which background.

Nothing is trained. Every layout of the generator is tried with every icon, drawn small over the background that the
border shows; the one with the least squared error is the result. The reader does not know the prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from bench.sketch.recipe.atlas import Atlas, recolour
from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS
from bench.sketch.recipe.data import (
    ALONE,
    AMONG,
    PLACES,
    TOKEN,
    centre_spot,
    side_by_side_spots,
    spots_at_place,
    three_spots,
)

PIXELS = 4  # a token's side here: pictures are read at a sixteenth of their size
ICONS = Path(__file__).with_name("icons.npz")
Spot = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows. `layout` is one, left, right, top, bottom, beside, above, or three."""

    things: tuple[str, ...]
    colour: str | None
    background: str
    layout: str


def save_icons(atlas: Atlas, file: Path = ICONS) -> None:
    """The icons as the reader needs them, premultiplied RGBA of 24 by 24 pixels."""
    side = ALONE * PIXELS
    icons = {concept.name: (atlas.picture(concept, None, side * 8) * 255) for concept in CONCEPTS}
    small = {
        name: icon.reshape(side, 8, side, 8, 4).mean((1, 3)).round().astype(np.uint8) for name, icon in icons.items()
    }
    np.savez_compressed(file, **small)


class Reader:
    def __init__(self, file: Path = ICONS) -> None:
        with np.load(file) as icons:
            self._icons = {name: icons[name].astype(np.float32) / 255 for name in icons.files}

    def read(self, picture: np.ndarray) -> Reading:
        """`picture` is 8-bit RGB, `(height, width, 3)`."""
        small = downsample(picture)
        rows, columns = small.shape[0] // PIXELS, small.shape[1] // PIXELS
        small = small[: rows * PIXELS, : columns * PIXELS]
        background = self.background(small)
        ground = np.array(BACKGROUNDS[background], dtype=np.float32) / 255
        empty = ((small - ground) ** 2).sum(-1)
        best, reading = np.inf, None
        for layout, spots, side in list_layouts(columns, rows):
            found = [self._nearest(small, ground, spot, side, coloured=layout == "one") for spot in spots]
            covered = sum(float(crop_window(empty, spot, side).sum()) for spot in spots)
            error = float(empty.sum()) - covered + sum(error for _, _, error in found)
            if error < best:
                names = tuple(name for name, _, _ in found)
                best, reading = error, Reading(names, found[0][1], background, layout)
        assert reading is not None
        return reading

    def background(self, small: np.ndarray) -> str:
        """The named colour nearest to the median of the border."""
        border = np.concatenate([small[:2].reshape(-1, 3), small[-2:].reshape(-1, 3), small[:, :2].reshape(-1, 3)])
        colour = np.median(border, axis=0) * 255
        return min(BACKGROUNDS, key=lambda name: float(((np.array(BACKGROUNDS[name]) - colour) ** 2).sum()))

    def _nearest(
        self, small: np.ndarray, ground: np.ndarray, spot: Spot, side: int, coloured: bool
    ) -> tuple[str, str | None, float]:
        """The icon, its colour where it was changed, and the squared error it leaves."""
        names, colours, premultiplied, through = self._coloured if coloured else self._plain[side]
        drawn = premultiplied + through * ground
        errors = ((drawn - crop_window(small, spot, side)) ** 2).sum((1, 2, 3))
        best = int(errors.argmin())
        return names[best], colours[best], float(errors[best])

    @cached_property
    def _plain(self) -> dict[int, "Stack"]:
        return {
            side: stack_icons([(name, None, icon) for name, icon in self._icons.items()], side)
            for side in (ALONE, AMONG)
        }

    @cached_property
    def _coloured(self) -> "Stack":
        able = {concept.name for concept in CONCEPTS if concept.colourable}
        icons: list[ColouredIcon] = [(name, None, icon) for name, icon in self._icons.items()]
        icons += [
            (name, colour, recolour_premultiplied(self._icons[name], colour))
            for name in sorted(able)
            for colour in COLOURS
        ]
        return stack_icons(icons, ALONE)


ColouredIcon = tuple[str, str | None, np.ndarray]  # a name, the colour where it was changed, the icon
Stack = tuple[list[str], list[str | None], np.ndarray, np.ndarray]


def stack_icons(icons: list[ColouredIcon], side: int) -> Stack:
    """Names, colours, premultiplied pictures `(n, p, p, 3)` and what shows through them `(n, p, p, 1)`."""
    pictures = np.stack([resize(icon, side * PIXELS) for _, _, icon in icons])
    return [name for name, _, _ in icons], [colour for _, colour, _ in icons], pictures[..., :3], 1 - pictures[..., 3:]


def resize(icon: np.ndarray, side: int) -> np.ndarray:
    planes = [Image.fromarray(icon[..., i]).resize((side, side), Image.Resampling.BOX) for i in range(4)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def recolour_premultiplied(icon: np.ndarray, colour: str) -> np.ndarray:
    """A premultiplied icon in another colour, as the atlas paints it."""
    alpha = np.maximum(icon[..., 3:], 1e-3)
    straight = np.concatenate([np.clip(icon[..., :3] / alpha, 0, 1), icon[..., 3:]], axis=-1)
    painted = np.asarray(recolour(Image.fromarray((straight * 255).round().astype(np.uint8), "RGBA"), colour))
    result = painted.astype(np.float32) / 255
    result[..., :3] *= result[..., 3:]
    return result


def downsample(picture: np.ndarray) -> np.ndarray:
    """Mean colours, 0 to 1, of blocks of a sixteenth of a token."""
    block = TOKEN // PIXELS
    height, width = (length // block * block for length in picture.shape[:2])
    blocks = picture[:height, :width].astype(np.float32).reshape(height // block, block, width // block, block, 3)
    mean: np.ndarray = blocks.mean((1, 3)) / 255
    return mean


def crop_window(small: np.ndarray, spot: Spot, side: int) -> np.ndarray:
    left, top = spot[0] * PIXELS, spot[1] * PIXELS
    return small[top : top + side * PIXELS, left : left + side * PIXELS]


def list_layouts(width: int, height: int) -> Iterator[tuple[str, list[Spot], int]]:
    """Every arrangement the generator draws on `width` by `height` tokens: its name, its spots, the things' side."""
    yield "one", centre_spot(width, height), ALONE
    for place in PLACES:
        yield place, spots_at_place(width, height, place), AMONG
    yield "beside", side_by_side_spots(width, height), AMONG
    yield "above", [(left, top) for top, left in side_by_side_spots(height, width)], AMONG
    yield "three", three_spots(width, height), AMONG
