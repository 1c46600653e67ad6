"""The prompts by which `flux/sketch` is measured, and the test whether a reading is right. Nothing here draws."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.sketch.recipe.concepts import CONCEPTS, Concept
from bench.sketch.recipe.data import Scene, Thing, make_scene, pairs
from bench.sketch.recipe.reader import Reading
from pipelines.acceleration import PRESETS

SEED = 2026
CONCEPT_BY_NAME = {concept.name: concept for concept in CONCEPTS}


def free_scene(prompt: str, *names: str, ground: str = "white", kind: str = "one", **details: Any) -> Scene:
    """A prompt as a person writes it, and what it should show; `colour` and `place` where it names them."""
    colour, place = details.get("colour"), details.get("place")
    things = tuple(Thing(CONCEPT_BY_NAME[name], colour, 1, 1, 6) for name in names)
    return Scene(8, 8, things, ground, prompt, kind, place)


FREE = (  # chosen by hand, none left out for being drawn badly
    free_scene("cat", "cat"),
    free_scene("A red apple!", "apple"),
    free_scene("draw me a rocket please", "rocket"),
    free_scene("a photo of a puppy on a green background", "dog", ground="green"),
    free_scene("BLUE HEART", "heart", kind="coloured", colour="blue"),
    free_scene("one single banana, black background", "banana", ground="black"),
    free_scene("a cute little panda", "panda"),
    free_scene("an illustration of a pizza on a yellow background", "pizza", ground="yellow"),
    free_scene("two rockets", "rocket", "rocket", kind="count"),
    free_scene("a cat and a dog", "cat", "dog", kind="two"),
    free_scene("a tree on the left", "tree", kind="place", place="left"),
    free_scene("a green book on a white background, high quality, 4k", "book", kind="coloured", colour="green"),
)
UNKNOWN = ("an old fisherman, soft light", "the skyline of a city at night", "qwertz", "a glass of water")


@dataclass(frozen=True)
class PromptCase:
    """A scene to draw, the seed, and further fields of the request."""

    scene: Scene
    seed: int
    fields: dict[str, Any] = field(default_factory=dict)


def layout_of(scene: Scene) -> tuple[str, ...]:
    """The layouts that are right for a scene's caption."""
    if scene.place:
        return (scene.place,)
    if len(scene.things) == 1:
        return ("one",)
    if scene.kind == "two":
        return ("above",) if " above " in scene.caption else ("beside",)
    return ("beside",) if len(scene.things) == 2 else ("three",)


def names_ground(scene: Scene) -> bool:
    names = f"{scene.background} grey" if scene.background == "gray" else scene.background
    return any(f"on {word}" in scene.caption or f"{word} background" in scene.caption for word in names.split())


def is_right(scene: Scene, reading: Reading) -> bool:
    return (
        reading.things == tuple(thing.concept.name for thing in scene.things)
        and reading.layout in layout_of(scene)
        and (scene.kind != "coloured" or reading.colour == scene.things[0].colour)
        and (not names_ground(scene) or reading.background == scene.background)
    )


def sample_scenes(kind: str, count: int, held_out: bool = False) -> list[Scene]:
    """`count` random scenes of a kind; of held-out ones, those whose held-out pair is of that kind."""
    rng, found = np.random.default_rng(SEED), list[Scene]()
    while len(found) < count:
        scene = make_scene(rng, train=not held_out)
        wanted = {"one": "ground", "coloured": "colour", "place": "place", "two": "two"}.get(kind)
        if scene.kind == kind and (not held_out or any(pair[0] == wanted for pair in pairs(scene))):
            found.append(scene)
    return found


def make_cases(found: list[Scene], **fields: Any) -> list[PromptCase]:
    return [PromptCase(scene, SEED + number, fields) for number, scene in enumerate(found)]


def one_of_each(words: Callable[[Concept], str]) -> list[Scene]:
    return [
        Scene(8, 8, (Thing(concept, None, 1, 1, 6),), "white", f"a {words(concept)} on a white background", "one")
        for concept in CONCEPTS
        if words(concept)
    ]


def list_tables(count: int) -> Iterator[tuple[str, str, list[PromptCase]]]:
    """Table, row, and what to draw for it."""
    yield "things", "every thing once", make_cases(one_of_each(lambda concept: concept.name))
    yield (
        "things",
        "a synonym of each",
        make_cases(one_of_each(lambda concept: concept.other[-1] if concept.other else "")),
    )
    for kind, words in {
        "one": "one thing",
        "coloured": "one thing in a colour",
        "place": "one thing at a place",
        "two": "two things",
        "count": "two or three of a thing",
    }.items():
        yield "kinds", words, make_cases(sample_scenes(kind, count))
        if kind != "count":
            yield "kinds", f"{words}, combination held out", make_cases(sample_scenes(kind, count, held_out=True))
    yield "free", "as people write", make_cases(list(FREE))
    for width, height in ((512, 512), (1024, 768), (1440, 512), (1536, 1536)):
        fields = {"image_size": {"width": width, "height": height}}
        yield "sizes", f"{width}x{height}", make_cases(sample_scenes("one", count), **fields)
    for steps in (4, 8, 16, 28):
        yield "steps", str(steps), make_cases(sample_scenes("one", count), num_inference_steps=steps)
    for scale in (1, 2, 3, 4.5, 6):
        yield "guidance", f"{scale:g}", make_cases(sample_scenes("one", count), guidance_scale=scale)
    for preset in PRESETS:
        yield "presets", preset, make_cases(sample_scenes("one", count), acceleration=preset)
