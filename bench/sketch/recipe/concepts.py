"""What the model is to know. A row of concepts.txt is a concept, its icon and its other names; with a
star its colour may change.

Icons are those of `fluent-emoji-flat` (Microsoft, MIT). People, skin tones, flags, religious signs and weapons are
left out.
"""

from pathlib import Path
from typing import NamedTuple


class Concept(NamedTuple):
    """A thing that can be drawn. `name` is the first word for it; `other` are synonyms."""

    name: str
    icon: str
    other: tuple[str, ...] = ()
    colourable: bool = False

    @property
    def plural(self) -> str:
        if self.name in UNCOUNTED:
            return UNCOUNTED[self.name]
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + ("es" if self.name.endswith(("s", "x", "ch", "sh", "o")) else "s")


UNCOUNTED = {
    "fish": "fish",
    "mouse": "mice",
    "leaf": "leaves",
    "maple leaf": "maple leaves",
    "wolf": "wolves",
    "sheep": "sheep",
    "deer": "deer",
    "snowman": "snowmen",
    "grapes": "grapes",
    "scissors": "scissors",
    "sunglasses": "sunglasses",
    "glasses": "glasses",
    "french fries": "french fries",
    "dice": "dice",
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "moose": "moose",
    "shrimp": "shrimp",
    "jeans": "jeans",
    "pants": "pants",
    "trousers": "trousers",
    "headphones": "headphones",
    "scarf": "scarves",
    "taco": "tacos",
    "piano": "pianos",
    "kangaroo": "kangaroos",
    "rhino": "rhinos",
    "hippo": "hippos",
    "money": "money",
    "rice": "rice",
    "fireworks": "fireworks",
    "calf": "calves",
    "loaf": "loaves",
    "knife": "knives",
}


def parse_concepts(text: str) -> list[Concept]:
    """`name = icon | synonym, synonym` a line; a star before the name marks a colourable concept."""
    found = []
    for line in filter(None, map(str.strip, text.strip().splitlines())):
        left, _, names = line.partition("|")
        name, _, icon = (part.strip() for part in left.partition("="))
        colourable = name.startswith("*")
        name = name.removeprefix("*")
        other = tuple(part.strip() for part in names.split(",") if part.strip())
        found.append(Concept(name, icon or name.replace(" ", "-"), other, colourable))
    return found


CONCEPTS = parse_concepts(Path(__file__).with_suffix(".txt").read_text())
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 48),
    "orange": (246, 140, 30),
    "yellow": (250, 206, 40),
    "green": (48, 160, 72),
    "blue": (40, 104, 214),
    "purple": (134, 66, 190),
    "pink": (244, 138, 180),
    "gray": (140, 144, 150),
    "brown": (136, 88, 52),
    "black": (40, 40, 46),
    "white": (244, 244, 246),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    **{name: COLOURS[name] for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "gray")},
    "red": (206, 52, 56),
    "yellow": (252, 222, 84),
    "green": (92, 178, 98),
    "blue": (74, 138, 226),
    "white": (255, 255, 255),
    "black": (16, 16, 20),
}
SCENES = (
    "beach",
    "sea",
    "meadow",
    "desert",
    "snow",
    "night",
    "mountains",
    "city",
    "forest",
    "sunset",
    "road",
    "room",
    "space",
)
# What everybody tries first is never held out of training.
NEVER_HELD_OUT = {
    (kind, name, colour)
    for name in ("apple", "banana", "cat", "dog", "leaf", "book", "heart", "star", "car")
    for kind in ("ground", "colour", "place")
    for colour in (*BACKGROUNDS, "left", "right", "top", "bottom")
    if (kind, name, colour) not in {("ground", "cat", "pink"), ("colour", "car", "purple")}
}
