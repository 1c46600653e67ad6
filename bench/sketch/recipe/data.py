"""Random scenes with captions, for training and evaluation.

A model learns deterministic pictures sharply, so the scenes are simple: one picture for each concept, plain
backgrounds or one of a few scenes, objects in two sizes at fixed places, and everything on the grid of the
transformer's tokens (64 pixels). Only a background that the caption does not name is random, so that another seed
gives another picture: one of many pale tints, since what lies between two of them is one of them too.

A tenth of the (concept, background), (concept, colour), (concept, place) and (concept, concept) pairs are held out of
training for the evaluation, except for those that people try first (`NEVER_HELD_OUT`).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from bench.sketch.recipe.atlas import Atlas
from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS, NEVER_HELD_OUT, SCENES, Concept
from bench.sketch.recipe.layouts import CANVAS, PLACES, Spot, assign_slots, side_of, spots_of, window_start
from bench.sketch.recipe.scenery import draw_scene

T = TypeVar("T")
TOKEN = 64  # pixels of a token's side
NUMBERS = {2: "two", 3: "three"}
SCENE_KINDS = {"one": 0.12, "coloured": 0.08, "place": 0.04, "count": 0.05, "two": 0.22, "three": 0.07, "scene": 0.42}
SCENE_THINGS = (0.15, 0.45, 0.30, 0.10)  # shares of scenes with none, one, two, three things
NAMED_BACKGROUND_SHARE, COLOURED_BACKGROUND_SHARE = 0.75, 0.85  # of captions, of named backgrounds
TINT_LIGHT, TINT_CHROMA = 0.88, 0.11  # of the tints: the mean of their channels, the most that one is above it
TWO_COLOURED = 0.4  # share of colourable things in a colour where there are several
SCATTER_TRIES = 30
COLOURABLE = [concept for concept in CONCEPTS if concept.colourable]


@dataclass(frozen=True)
class Thing:
    """One object, in its slot, or where `scattered` says."""

    concept: Concept
    colour: str | None
    slot: str
    scattered: tuple[Spot, ...] = ()

    @property
    def spots(self) -> list[Spot]:
        return list(self.scattered) or spots_of(self.slot)

    @property
    def side(self) -> int:
        return side_of(self.slot)


@dataclass(frozen=True)
class Scene:
    """What is drawn on `width` x `height` tokens, the words for it, and whether they name the background.

    `background` is the name of a colour or a scene, or a tint, "#rrggbb".
    """

    width: int
    height: int
    things: tuple[Thing, ...]
    background: str
    caption: str
    kind: str
    place: str | None = None
    named: bool = True


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
    return ("an " if noun[0] in "aeiou" and not noun.startswith(("uni", "ufo")) else "a ") + noun


def make_scene(rng: np.random.Generator, width: int = 8, height: int = 8, train: bool = True) -> Scene:
    """A random scene of `width` x `height` tokens. `train=False` makes only scenes with a held-out combination."""
    while True:
        kind = str(rng.choice(list(SCENE_KINDS), p=list(SCENE_KINDS.values())))
        scene = build(rng, kind, width, height)
        novel = any(is_held_out(*pair) for pair in pairs(scene))
        if novel != train:
            return scene


def scatter(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with its things anywhere, so that the model learns every square; as it is where they find no room."""
    taken, things = np.zeros((CANVAS, CANVAS), dtype=bool), list[Thing]()
    for thing in scene.things:
        spots = list[Spot]()
        for _ in thing.spots:
            for _ in range(SCATTER_TRIES):
                left, top = (int(rng.integers(0, CANVAS + 1 - thing.side)) for _ in range(2))
                square = taken[top : top + thing.side, left : left + thing.side]
                if not square.any():
                    break
            else:
                return scene
            square[:] = True
            spots.append((left, top))
        things.append(replace(thing, scattered=tuple(spots)))
    return replace(scene, things=tuple(things))


def pairs(scene: Scene) -> list[tuple[str, ...]]:
    """The combinations in a scene that may be held out."""
    names = [thing.concept.name for thing in scene.things]
    ground = scene.background if scene.named and scene.background != "white" else None
    found: list[tuple[str, ...]] = [("ground", name, ground) for name in names if ground]
    found += [("colour", thing.concept.name, thing.colour) for thing in scene.things if thing.colour]
    found += [("place", name, scene.place) for name in names if scene.place]
    found += [("two", *sorted((first, second))) for index, first in enumerate(names) for second in names[:index]]
    return found


def build(rng: np.random.Generator, kind: str, width: int, height: int) -> Scene:
    if kind == "scene":
        return build_on_scene(rng, width, height)
    named = bool(rng.random() < NAMED_BACKGROUND_SHARE)
    background = pick_background(rng) if named else draw_tint(rng)
    place = pick(rng, PLACES) if kind == "place" else None
    if kind in ("two", "three"):
        concepts, above = pick_unlike(rng, 2 if kind == "two" else 3), kind == "two" and rng.random() < 0.4
        slots = assign_slots([concept.name for concept in concepts], False, above)
        things = [dress(rng, *pair, background, TWO_COLOURED) for pair in zip(concepts, slots, strict=True)]
        phrase = join_phrases([describe(rng, thing) for thing in things], " above " if above else "", rng)
    elif kind == "count":
        count = int(rng.integers(2, 4))
        things = [dress(rng, pick_concept(rng), "pair" if count == 2 else "three", background, TWO_COLOURED / 2)]
        phrase = f"{NUMBERS[count]} {name_in_colour(rng, things[0], things[0].concept.plural)}"
    else:
        concept = pick(rng, COLOURABLE) if kind == "coloured" else pick_concept(rng)
        things = [dress(rng, concept, place or "alone", background, float(kind == "coloured"))]
        phrase = describe(rng, things[0])
        if place:
            phrase += f" {'on' if place in ('left', 'right') else 'at'} the {place}"
    caption = make_caption(rng, phrase, background if named else None)
    return Scene(width, height, tuple(things), background, caption, kind, place, named)


def pick_background(rng: np.random.Generator) -> str:
    return pick(rng, list(BACKGROUNDS)) if rng.random() < COLOURED_BACKGROUND_SHARE else "white"


def draw_tint(rng: np.random.Generator) -> str:
    """A pale colour, evenly from the disc of those of one lightness."""
    hue, chroma = 2 * np.pi * rng.random(), TINT_CHROMA * np.sqrt(rng.random())
    channels = TINT_LIGHT + chroma * np.cos(hue - 2 * np.pi * np.arange(3) / 3)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def build_on_scene(rng: np.random.Generator, width: int, height: int) -> Scene:
    """None to three things on a scene."""
    background, count = pick(rng, SCENES), int(rng.choice(len(SCENE_THINGS), p=SCENE_THINGS))
    concepts = pick_unlike(rng, count)
    slots = assign_slots([concept.name for concept in concepts], True) if count else []
    things = [dress(rng, *pair, background, TWO_COLOURED / 2) for pair in zip(concepts, slots, strict=True)]
    phrase = join_phrases([describe(rng, thing) for thing in things], "", rng)
    caption = f"{phrase} {SCENE_PHRASES[background]}".strip()
    return Scene(width, height, tuple(things), background, caption, "scene")


SCENE_PHRASES = {
    "beach": "on a beach",
    "sea": "in the sea",
    "meadow": "on a meadow",
    "desert": "in the desert",
    "snow": "in the snow",
    "night": "at night",
    "mountains": "in the mountains",
    "city": "in a city",
    "forest": "in a forest",
    "sunset": "at sunset",
    "road": "on a road",
    "room": "in a room",
    "space": "in space",
}


def pick_concept(rng: np.random.Generator) -> Concept:
    return pick(rng, CONCEPTS)


def pick_unlike(rng: np.random.Generator, count: int) -> list[Concept]:
    found: dict[Concept, None] = {}
    while len(found) < count:
        found[pick_concept(rng)] = None
    return list(found)


def dress(rng: np.random.Generator, concept: Concept, slot: str, background: str, share: float) -> Thing:
    """The thing, in a colour that is not the background's with that share."""
    coloured = concept.colourable and rng.random() < share
    return Thing(concept, pick(rng, [name for name in COLOURS if name != background]) if coloured else None, slot)


def name_in_colour(rng: np.random.Generator, thing: Thing, noun: str) -> str:
    return f"{spell_colour(rng, thing.colour)} {noun}" if thing.colour else noun


def describe(rng: np.random.Generator, thing: Thing) -> str:
    noun = name_in_colour(rng, thing, choose_noun(rng, thing.concept))
    return with_article(noun) if thing.colour or rng.random() < 0.7 else noun


def join_phrases(phrases: list[str], between: str, rng: np.random.Generator) -> str:
    """`between` joins two; where it is empty, words that mean side by side do."""
    if len(phrases) == 3:
        return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    return (between or str(rng.choice([" and ", " next to ", " with "]))).join(phrases)


def make_caption(rng: np.random.Generator, phrase: str, background: str | None) -> str:
    """The caption: sometimes with an opening such as "a photo of", with the background unless it is None."""
    lead = str(rng.choice(["", "", "", "a picture of ", "a photo of ", "a drawing of "]))
    if background is None:
        return lead + phrase
    ground = spell_colour(rng, background)
    return (
        lead
        + phrase
        + str(rng.choice([f" on {with_article(ground)} background", f", {ground} background", f" on {ground}"]))
    )


def plain_colour(background: str) -> np.ndarray:
    """The colour of a background that is no scene, float32 RGB in 0..1, `(3,)`."""
    levels = list(bytes.fromhex(background[1:])) if background.startswith("#") else BACKGROUNDS[background]
    return np.array(levels, dtype=np.float32) / 255


def draw_ground(background: str, width: int, height: int) -> np.ndarray:
    """The background alone, float32 RGB in 0..1, `(64 height, 64 width, 3)`."""
    if background in SCENES:
        return draw_scene(background, width, height, TOKEN).copy()
    canvas = np.empty((height * TOKEN, width * TOKEN, 3), dtype=np.float32)
    canvas[:] = plain_colour(background)
    return canvas


def render(scene: Scene, atlas: Atlas) -> np.ndarray:
    """The scene as float32 RGB in 0..1, `(64 height, 64 width, 3)`."""
    canvas = draw_ground(scene.background, scene.width, scene.height)
    for thing in scene.things:
        side = thing.side * TOKEN
        picture = atlas.picture(thing.concept, thing.colour, side)
        for left, top in thing.spots:
            x, y = (left - window_start(scene.width)) * TOKEN, (top - window_start(scene.height)) * TOKEN
            spot = canvas[y : y + side, x : x + side]
            spot *= 1 - picture[..., 3:]
            spot += picture[..., :3]
    return canvas
