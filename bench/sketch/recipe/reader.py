"""Recognizes what a picture shows: which things, where, in which colour, on which background.

Nothing is trained. Every layout of the generator is tried with every icon in every colour, drawn small over the
background that the border shows; the one with the least squared error is the result. The reader does not know the
prompt.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from bench.sketch.recipe.atlas import Atlas, recolour
from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS, SCENES
from bench.sketch.recipe.data import TOKEN, draw_ground
from bench.sketch.recipe.layouts import ALONE, AMONG, CANVAS, PLACES, Spot, side_of, spots_of

PIXELS = 4  # a token's side here: pictures are read at a sixteenth of their size
ICONS = Path(__file__).with_name("icons.npz")
LEAST = 0.1  # squared error that a thing must explain: noise makes a white star on white fit a little better than none
LAYOUTS = (
    (),
    ("alone",),
    *((place,) for place in PLACES),
    ("left", "right"),
    ("top", "bottom"),
    ("low left", "low right"),
    ("top", "low left", "low right"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows: things, the colours that were changed, and slots, in the order of the slots."""

    things: tuple[str, ...]
    colours: tuple[str | None, ...]
    slots: tuple[str, ...]
    background: str


def save_icons(atlas: Atlas, file: Path = ICONS) -> None:
    """The icons as the reader needs them, premultiplied RGBA of 24 by 24 pixels, and the scenes."""
    side = ALONE * PIXELS
    icons = {concept.name: (atlas.picture(concept, None, side * 8) * 255) for concept in CONCEPTS}
    small = {
        name: icon.reshape(side, 8, side, 8, 4).mean((1, 3)).round().astype(np.uint8) for name, icon in icons.items()
    }
    scenes = {
        f"scene {name}": (downsample(draw_ground(name, CANVAS, CANVAS) * 255) * 255).round().astype(np.uint8)
        for name in SCENES
    }
    np.savez_compressed(file, allow_pickle=False, **small, **scenes)


class Reader:
    def __init__(self, file: Path = ICONS) -> None:
        with np.load(file) as kept:
            pictures = {name: kept[name].astype(np.float32) / 255 for name in kept.files}
        self._icons = {name: picture for name, picture in pictures.items() if not name.startswith("scene ")}
        self._scenes = {name: pictures[f"scene {name}"] for name in SCENES}

    def read(self, picture: np.ndarray) -> Reading:
        """`picture` is 8-bit RGB, `(height, width, 3)`. What is read is the canvas, its middle square."""
        small = downsample(crop_canvas(picture))
        background, ground = self._ground(small)
        empty, found = ((small - ground) ** 2).sum(-1), dict[str, tuple[str, str | None, float]]()
        best, reading = np.inf, Reading((), (), (), background)
        for layout in LAYOUTS:
            error = float(empty.sum())
            for slot in layout:
                (spot,), side = spots_of(slot), side_of(slot)
                if slot not in found:
                    found[slot] = self._nearest(small, ground, spot, side)
                error += found[slot][2] + LEAST - float(crop_window(empty, spot, side).sum())
            if error < best:
                best = error
                names, colours = (tuple(found[slot][part] for slot in layout) for part in (0, 1))
                reading = Reading(names, colours, layout, background)  # type: ignore[arg-type]
        return reading

    def _ground(self, small: np.ndarray) -> tuple[str, np.ndarray]:
        """What the border shows: a scene, or a plain colour, by the name of the nearest one."""
        colour = np.median(border_of(small), axis=0)
        name = min(BACKGROUNDS, key=lambda name: float(((colour - np.array(BACKGROUNDS[name]) / 255) ** 2).sum()))
        grounds = {name: np.broadcast_to(colour.astype(np.float32), small.shape)}
        for name, scene in self._scenes.items():  # as a plain one, as light as the picture is
            grounds[name] = scene + (colour - np.median(border_of(scene), axis=0)).astype(np.float32)

        def distance(name: str) -> float:
            error = border_of(((grounds[name] - small) ** 2).sum(-1, keepdims=True))
            return float(np.sqrt(error).mean())  # not the square: a thing that reaches the border counts little

        best = min(grounds, key=distance)
        return best, grounds[best]

    def _nearest(self, small: np.ndarray, ground: np.ndarray, spot: Spot, side: int) -> tuple[str, str | None, float]:
        """The icon, its colour where it was changed, and the squared error it leaves."""
        stack, under, seen = self._stacks[side], crop_window(ground, spot, side), crop_window(small, spot, side)
        best = int(stack.distances(under, seen).argmin())
        error = float(((stack.drawn_on(best, under) - seen) ** 2).sum())
        return *stack.names[best], error

    @cached_property
    def _stacks(self) -> dict[int, "Stack"]:
        """By side: every icon as it is, and the colourable ones in every colour."""
        icons: list[ColouredIcon] = [(name, None, icon) for name, icon in self._icons.items()]
        icons += [
            (concept.name, colour, recolour_premultiplied(self._icons[concept.name], colour))
            for concept in CONCEPTS
            if concept.colourable
            for colour in COLOURS
        ]
        return {side: Stack(icons, side) for side in (ALONE, AMONG)}


ColouredIcon = tuple[str, str | None, np.ndarray]  # a name, the colour where it was changed, the icon


class Stack:
    """Icons of one size: their names and colours, and how far a picture is from each of them."""

    def __init__(self, icons: list[ColouredIcon], side: int) -> None:
        pictures = np.stack([resize(icon, side * PIXELS, side * PIXELS) for _, _, icon in icons])
        self.names = [(name, colour) for name, colour, _ in icons]
        self._pictures, self._through = pictures[..., :3], 1 - pictures[..., 3:]
        count = len(icons)
        self._flat, self._clear = self._pictures.reshape(count, -1), self._through.reshape(count, -1)
        self._both = (self._pictures * self._through).reshape(count, -1)
        self._squares, self._clear_squares = (self._flat**2).sum(1), self._clear**2

    def drawn_on(self, number: int, ground: np.ndarray) -> np.ndarray:
        drawn: np.ndarray = self._pictures[number] + self._through[number] * ground
        return drawn

    def distances(self, ground: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """The squared error of each icon drawn on `ground`, `(n,)`, less what is the same for all of them.

        The square is multiplied out, so that it takes four products with a vector and no picture of each icon.
        """
        mixed = self._both @ ground.ravel() - self._flat @ seen.ravel() - self._clear @ (ground * seen).sum(-1).ravel()
        errors: np.ndarray = self._squares + self._clear_squares @ (ground**2).sum(-1).ravel() + 2 * mixed
        return errors


def border_of(picture: np.ndarray) -> np.ndarray:
    """The pixels at the top and at both sides, `(pixels, channels)`; things stand at the bottom."""
    parts = picture[:2], picture[:, :2], picture[:, -2:]
    return np.concatenate([part.reshape(-1, picture.shape[-1]) for part in parts])


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = [
        Image.fromarray(picture[..., i]).resize((width, height), Image.Resampling.BOX) for i in range(picture.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def recolour_premultiplied(icon: np.ndarray, colour: str) -> np.ndarray:
    """A premultiplied icon in another colour, as the atlas paints it."""
    alpha = np.maximum(icon[..., 3:], 1e-3)
    straight = np.concatenate([np.clip(icon[..., :3] / alpha, 0, 1), icon[..., 3:]], axis=-1)
    painted = np.asarray(recolour(Image.fromarray((straight * 255).round().astype(np.uint8), "RGBA"), colour))
    result = painted.astype(np.float32) / 255
    result[..., :3] *= result[..., 3:]
    return result


def crop_canvas(picture: np.ndarray) -> np.ndarray:
    """The middle square of a picture, 512 pixels a side."""
    height, width = picture.shape[:2]
    short, side = min(height, width), CANVAS * TOKEN
    left, top = (width - short) // 2, (height - short) // 2
    square = Image.fromarray(picture[top : top + short, left : left + short])
    return np.asarray(square if short == side else square.resize((side, side), Image.Resampling.LANCZOS))


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
