"""Captioned scenes with the exact truth beside each caption.

One look a concept, plain backgrounds, objects that grow with the picture: what is deterministic is learned sharply.
Without a named background the picture is white. Held out of training, for an honest evaluation: a tenth of the
(concept, background), (concept, colour) and (concept, concept) pairs.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from weights.sketch.recipe.atlas import Atlas
from weights.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS, Concept

T = TypeVar("T")
PLACES = {"left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
NUMBERS = {2: "two", 3: "three"}
COLOURABLE = [concept for concept in CONCEPTS if concept.colourable]


@dataclass(frozen=True)
class Thing:
    """One object: its centre and size as fractions of width, height and the shorter side."""

    concept: Concept
    colour: str | None
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """What is drawn, and the words for it."""

    things: tuple[Thing, ...]
    background: str
    caption: str
    kind: str = field(default="one")


def held_out(*names: str) -> bool:
    """Whether a combination is kept for the evaluation: a tenth of all, always the same ones."""
    return zlib.crc32("|".join(names).encode()) % 10 == 0


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def word(rng: np.random.Generator, concept: Concept) -> str:
    """Its name, or now and then a synonym."""
    names = [concept.name] * 3 + list(concept.other)
    return names[int(rng.integers(len(names)))]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" and not noun.startswith("uni") else "a ") + noun


def make_scene(rng: np.random.Generator, train: bool = True) -> Scene:
    """A random scene. `train=False` makes only scenes with a held-out combination, of kinds one, coloured and two."""
    while True:
        kind = str(rng.choice(["one", "coloured", "place", "two", "count"], p=[0.56, 0.14, 0.1, 0.11, 0.09]))
        scene = build(rng, kind)
        novel = any(held_out(*pair) for pair in pairs(scene))
        if novel != train:
            return scene


def pairs(scene: Scene) -> list[tuple[str, ...]]:
    """The combinations in a scene that may be held out."""
    found: list[tuple[str, ...]] = [
        ("ground", thing.concept.name, scene.background) for thing in scene.things if scene.background != "white"
    ]
    found += [("colour", thing.concept.name, thing.colour) for thing in scene.things if thing.colour]
    if scene.kind == "two":
        found.append(("two", *sorted(thing.concept.name for thing in scene.things)))
    return found


def build(rng: np.random.Generator, kind: str) -> Scene:
    background = pick(rng, list(BACKGROUNDS)) if rng.random() < 0.5 else "white"
    concept = pick(rng, COLOURABLE if kind == "coloured" else CONCEPTS)
    noun, colour = word(rng, concept), None
    if kind == "coloured":
        colour = pick(rng, [name for name in COLOURS if name != background])
        noun = f"{colour} {noun}"
    if kind == "two":
        return two(rng, concept, noun, background)
    if kind == "count":
        count = int(rng.integers(2, 4))
        size = 0.42 if count == 2 else 0.29
        things = [Thing(concept, None, (i + 0.5) / count * 0.94 + 0.03, 0.5, size) for i in range(count)]
        return Scene(tuple(things), background, sentence(rng, f"{NUMBERS[count]} {concept.plural}", background), kind)
    if kind == "place":
        place = pick(rng, list(PLACES))
        x, y = PLACES[place]
        said = f"{article(noun)} {'on the ' + place if place in ('left', 'right') else 'at the ' + place}"
        return Scene((Thing(concept, None, x, y, 0.46),), background, sentence(rng, said, background), kind)
    said = article(noun) if rng.random() < 0.7 else noun
    return Scene((Thing(concept, colour, 0.5, 0.5, 0.66),), background, sentence(rng, said, background), kind)


def two(rng: np.random.Generator, first: Concept, noun: str, background: str) -> Scene:
    second = pick(rng, [concept for concept in CONCEPTS if concept != first])
    other = word(rng, second)
    if rng.random() < 0.6:
        spots = ((0.27, 0.5), (0.73, 0.5))
        said = pick(rng, [f"{article(noun)} and {article(other)}", f"{article(noun)} next to {article(other)}"])
    else:
        spots = ((0.5, 0.27), (0.5, 0.73))
        said = f"{article(noun)} above {article(other)}"
    things = [Thing(concept, None, x, y, 0.42) for concept, (x, y) in zip((first, second), spots, strict=True)]
    return Scene(tuple(things), background, sentence(rng, said, background), "two")


def sentence(rng: np.random.Generator, said: str, background: str) -> str:
    """A caption: lead-ins that mean nothing, the background if it is not white (white is sometimes named)."""
    lead = str(rng.choice(["", "", "", "a picture of ", "a photo of ", "a drawing of "]))
    if background == "white" and rng.random() < 0.75:
        return lead + said
    ground = str(rng.choice([f" on a {background} background", f", {background} background", f" on {background}"]))
    return lead + said + ground


def render(
    scene: Scene, atlas: Atlas, width: int, height: int, jitter: np.random.Generator | None = None
) -> np.ndarray:
    """The scene as float32 RGB in 0..1, `(height, width, 3)`. Sizes and places vary a little with `jitter`."""
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = np.array(BACKGROUNDS[scene.background], dtype=np.float32) / 255
    short = min(width, height)
    tall = len(scene.things) == 2 and scene.things[0].y != scene.things[1].y
    room = height if tall else width
    for thing in scene.things:
        reach = min(short, room * (1.0 if len(scene.things) > 1 else 2.0))
        size = int(thing.size * reach)
        dx = dy = 0.0
        if jitter is not None:
            size = int(size * (0.97 + 0.03 * jitter.integers(3)))
            dx, dy = jitter.uniform(-0.02, 0.02, 2) * short
        picture = atlas.picture(thing.concept, thing.colour, size)
        left = int(np.clip(thing.x * width + dx - size / 2, 0, width - size))
        top = int(np.clip(thing.y * height + dy - size / 2, 0, height - size))
        spot = canvas[top : top + size, left : left + size]
        spot *= 1 - picture[..., 3:]
        spot += picture[..., :3]
    return canvas
