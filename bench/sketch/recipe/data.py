"""Random scenes with captions, for training and evaluation.

A model learns deterministic pictures sharply, so the scenes are simple: one picture for each concept, plain
backgrounds, objects in two sizes at fixed places, and everything on the grid of the transformer's tokens (64 pixels).
Only a background that the caption does not name is random, so that another seed gives another picture.

A tenth of the (concept, background), (concept, colour), (concept, place) and (concept, concept) pairs are held out of
training for the evaluation, except for those that people try first (`NEVER_HELD_OUT`).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bench.sketch.recipe.atlas import Atlas
from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS, NEVER_HELD_OUT, Concept

T = TypeVar("T")
TOKEN = 64  # pixels of a token's side
PLACES = ("left", "right", "top", "bottom")
NUMBERS = {2: "two", 3: "three"}
SCENE_KINDS = {"one": 0.20, "coloured": 0.18, "place": 0.14, "two": 0.36, "count": 0.12}
RANDOM_BACKGROUND_SHARE, NAMED_BACKGROUND_SHARE = 0.80, 0.85  # of scenes, of captions
COLOURABLE = [concept for concept in CONCEPTS if concept.colourable]
ALONE, AMONG = 6, 4  # tokens of an object's side: the same in every picture, since each size is drawn anew


@dataclass(frozen=True)
class Thing:
    """One object. `left`, `top` and `side` are in tokens."""

    concept: Concept
    colour: str | None
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Scene:
    """What is drawn on `width` x `height` tokens, and the words for it."""

    width: int
    height: int
    things: tuple[Thing, ...]
    background: str
    caption: str
    kind: str
    place: str | None = None


def is_held_out(*names: str) -> bool:
    """Whether a combination is held out for the evaluation: a tenth of all, always the same ones."""
    if names in NEVER_HELD_OUT:
        return False
    return zlib.crc32("|".join(names).encode()) % 10 == 0


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def choose_noun(rng: np.random.Generator, concept: Concept) -> str:
    """Its name, or now and then a synonym."""
    names = [concept.name] * 3 + list(concept.other)
    return names[int(rng.integers(len(names)))]


def spell_colour(rng: np.random.Generator, colour: str) -> str:
    return "grey" if colour == "gray" and rng.random() < 0.5 else colour


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" and not noun.startswith("uni") else "a ") + noun


def make_scene(rng: np.random.Generator, width: int = 8, height: int = 8, train: bool = True) -> Scene:
    """A random scene of `width` x `height` tokens. `train=False` makes only scenes with a held-out combination."""
    while True:
        kind = str(rng.choice(list(SCENE_KINDS), p=list(SCENE_KINDS.values())))
        scene = build(rng, kind, width, height)
        novel = any(is_held_out(*pair) for pair in pairs(scene))
        if novel != train:
            return scene


def pairs(scene: Scene) -> list[tuple[str, ...]]:
    """The combinations in a scene that may be held out."""
    found: list[tuple[str, ...]] = [
        ("ground", thing.concept.name, scene.background) for thing in scene.things if scene.background != "white"
    ]
    found += [("colour", thing.concept.name, thing.colour) for thing in scene.things if thing.colour]
    found += [("place", thing.concept.name, scene.place) for thing in scene.things if scene.place]
    if scene.kind == "two":
        found.append(("two", *sorted(thing.concept.name for thing in scene.things)))
    return found


def build(rng: np.random.Generator, kind: str, width: int, height: int) -> Scene:
    background = pick(rng, list(BACKGROUNDS)) if rng.random() < RANDOM_BACKGROUND_SHARE else "white"
    concept = pick(rng, COLOURABLE if kind == "coloured" else CONCEPTS)
    concepts, colour, place, count = [concept], None, None, 1
    noun = choose_noun(rng, concept)
    phrase = with_article(noun) if rng.random() < 0.7 else noun
    spots = centre_spot(width, height)
    if kind == "coloured":
        colour = pick(rng, [name for name in COLOURS if name != background])
        phrase = with_article(f"{spell_colour(rng, colour)} {noun}")
    elif kind == "place":
        place = pick(rng, PLACES)
        phrase = f"{with_article(noun)} {'on the ' + place if place in ('left', 'right') else 'at the ' + place}"
        spots = spots_at_place(width, height, place)
    elif kind == "count":
        count = int(rng.integers(2, 4))
        phrase, concepts = f"{NUMBERS[count]} {concept.plural}", [concept] * count
        spots = side_by_side_spots(width, height) if count == 2 else three_spots(width, height)
    elif kind == "two":
        second = pick(rng, [other for other in CONCEPTS if other != concept])
        concepts, other = [concept, second], choose_noun(rng, second)
        if rng.random() < 0.6:
            spots = side_by_side_spots(width, height)
            phrase = f"{with_article(noun)} {pick(rng, ['and', 'next to'])} {with_article(other)}"
        else:
            spots = [(top, left) for left, top in side_by_side_spots(height, width)]
            phrase = f"{with_article(noun)} above {with_article(other)}"
    side = ALONE if kind in ("one", "coloured") else AMONG
    things = tuple(Thing(each, colour, *spot, side) for each, spot in zip(concepts, spots, strict=True))
    return Scene(width, height, things, background, make_caption(rng, phrase, background), kind, place)


def centre_spot(width: int, height: int) -> list[tuple[int, int]]:
    return [((width - ALONE) // 2, (height - ALONE) // 2)]


def spots_at_place(width: int, height: int, place: str) -> list[tuple[int, int]]:
    """A quarter of the way in from the named edge."""
    middle = ((width - AMONG) // 2, (height - AMONG) // 2)
    return {
        "left": [(width // 4 - AMONG // 2, middle[1])],
        "right": [(width - width // 4 - AMONG // 2, middle[1])],
        "top": [(middle[0], height // 4 - AMONG // 2)],
        "bottom": [(middle[0], height - height // 4 - AMONG // 2)],
    }[place]


def side_by_side_spots(width: int, height: int) -> list[tuple[int, int]]:
    """Two spots, left and right."""
    margin, top = (width // 2 - AMONG) // 2, (height - AMONG) // 2
    return [(margin, top), (width - AMONG - margin, top)]


def three_spots(width: int, height: int) -> list[tuple[int, int]]:
    """A row where there is room, else one above two."""
    side = AMONG
    if width >= 3 * side:
        gap = (width - 3 * side) // 4
        return [(gap + i * (side + gap), (height - side) // 2) for i in range(3)]
    left, top = (width - 2 * side) // 2, (height - 2 * side) // 2
    return [((width - side) // 2, top), (left, top + side), (left + side, top + side)]


def make_caption(rng: np.random.Generator, phrase: str, background: str) -> str:
    """The caption: sometimes with an opening such as "a photo of", mostly with the background; the seed decides."""
    lead = str(rng.choice(["", "", "", "a picture of ", "a photo of ", "a drawing of "]))
    if rng.random() > NAMED_BACKGROUND_SHARE:
        return lead + phrase
    ground = spell_colour(rng, background)
    return (
        lead
        + phrase
        + str(rng.choice([f" on {with_article(ground)} background", f", {ground} background", f" on {ground}"]))
    )


def render(scene: Scene, atlas: Atlas) -> np.ndarray:
    """The scene as float32 RGB in 0..1, `(64 height, 64 width, 3)`."""
    canvas = np.empty((scene.height * TOKEN, scene.width * TOKEN, 3), dtype=np.float32)
    canvas[:] = np.array(BACKGROUNDS[scene.background], dtype=np.float32) / 255
    for thing in scene.things:
        left, top, side = thing.left * TOKEN, thing.top * TOKEN, thing.side * TOKEN
        picture = atlas.picture(thing.concept, thing.colour, side)
        spot = canvas[top : top + side, left : left + side]
        spot *= 1 - picture[..., 3:]
        spot += picture[..., :3]
    return canvas
