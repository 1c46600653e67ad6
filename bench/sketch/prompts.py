"""The prompts by which `flux/sketch` is measured, and the test whether a reading is right. Nothing here draws."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.sketch.recipe.concepts import CONCEPTS, Concept
from bench.sketch.recipe.data import Scene, Thing, make_scene, pairs
from bench.sketch.recipe.reader import Reading
from pipelines.acceleration import PRESETS
from weights.sketch import MANIFEST

SEED = 2026
KNOWS = MANIFEST["knows"]
KNOWN = [concept for concept in CONCEPTS if concept.name in KNOWS["things"]]
# 200 of PartiPrompts (Google, Apache-2.0; github.com/google-research/parti): written by people who never saw this
# model's words. Those of the challenges Basic and Simple Detail, without people, arts and abstractions, shuffled with
# one seed. After a tab the main noun, in this model's word for it; nothing where it has none, which counts as wrong.
FREE = Path(__file__).with_name("free_prompts.tsv")
NOISE = """please, highly detailed, 4k, 8k uhd, photorealistic, cinematic lighting, soft shadows, masterpiece,
trending on artstation, studio ghibli style, by a famous artist, award winning, minimalist, vibrant colors, ultra
realistic, bokeh, 35mm lens, hdr, octane render, unreal engine, wide angle, intricate, elegant, digital painting,
concept art, sharp focus, dramatic, whimsical, adorable, very cute, incredibly beautiful, professional, vector style,
pixel perfect, sticker, for my sister's birthday party, as a logo, isolated, centered, symmetrical, hand drawn,
watercolor, oil paint on canvas, sehr schön, très joli, muy bonito, hyperdetialed, relistic, beautifull, lookin happy,
extremely fluffy, majestic, tiny, gigantic, old, brand new, wooden, shiny, glossy, matte, furry, sleepy, playful,
curious, brave, funny, --ar 3:2, --v 5""".replace("\n", " ").split(", ")


@dataclass(frozen=True)
class PromptCase:
    """A scene to draw, the seed, and further fields of the request. `noun` is all that a free prompt is asked for."""

    scene: Scene
    seed: int
    fields: dict[str, Any] = field(default_factory=dict)
    noun: str | None = None


def wanted_things(scene: Scene) -> dict[str, tuple[str, str | None]]:
    """By slot, the thing and the colour that it is to have."""
    several = {"pair": ("left", "right"), "three": ("top", "low left", "low right")}
    return {
        slot: (thing.concept.name, thing.colour)
        for thing in scene.things
        for slot in several.get(thing.slot, (thing.slot,))
    }


def next_other(cases: Sequence[PromptCase], number: int) -> int:
    """The number of the next case that asks for something else, or `number` where none does."""

    def asked(case: PromptCase) -> object:
        return case.noun or (wanted_things(case.scene), case.scene.background)

    following = (other % len(cases) for other in range(number + 1, number + len(cases)))
    return next((other for other in following if asked(cases[other]) != asked(cases[number])), number)


def has_things(scene: Scene, reading: Reading) -> bool:
    """Every thing is there and where it should be."""
    return dict(zip(reading.slots, reading.things, strict=True)) == {
        slot: name for slot, (name, _) in wanted_things(scene).items()
    }


def has_colours(scene: Scene, reading: Reading) -> bool:
    """Every thing for which the prompt names a colour has it."""
    seen = dict(zip(reading.slots, reading.colours, strict=True))
    return all(seen.get(slot) == colour for slot, (_, colour) in wanted_things(scene).items() if colour)


def is_right(case: PromptCase, reading: Reading) -> bool:
    """Everything that the prompt asks for is there."""
    if case.noun is not None:
        return case.noun != "" and (case.noun in reading.things or case.noun == reading.background)
    scene = case.scene
    grounded = not scene.named or reading.background == scene.background
    return has_things(scene, reading) and has_colours(scene, reading) and grounded


def is_known(thing: Thing) -> bool:
    """Whether the landed weights have learned the thing, in its colour."""
    colours = KNOWS["colours"]
    recoloured = thing.colour in colours["are"] and thing.concept.name in colours["of"]
    return thing.concept.name in KNOWS["things"] and (thing.colour is None or recoloured)


def sample_scenes(kind: str, count: int, held_out: bool = False, coloured: bool | None = None) -> list[Scene]:
    """`count` random scenes of a kind; of held-out ones, those whose held-out pair is of that kind.

    `coloured` asks for all things, or none, to be in a colour.
    """
    rng, found = np.random.default_rng(SEED), list[Scene]()
    wanted = {"one": "ground", "scene": "ground", "coloured": "colour", "place": "place", "two": "two"}.get(kind)
    while len(found) < count:
        scene = make_scene(rng, train=not held_out)
        if scene.kind != kind or (held_out and not any(pair[0] == wanted for pair in pairs(scene))):
            continue
        if not all(is_known(thing) for thing in scene.things):
            continue
        if coloured is None or all(bool(thing.colour) == coloured for thing in scene.things):
            found.append(scene)
    return found


def sample_on_scenes(count: int) -> list[Scene]:
    """One thing each on a scene."""
    return [scene for scene in sample_scenes("scene", 4 * count) if len(scene.things) == 1][:count]


def add_noise_words(scenes: list[Scene]) -> list[Scene]:
    """The same with 3 to 20 words around that the model does not know."""
    rng, found = np.random.default_rng(SEED), list[Scene]()
    for scene in scenes:
        words, around = int(rng.integers(3, 21)), list[str]()
        while sum(len(part.split()) for part in around) < words:
            around.append(NOISE[int(rng.integers(len(NOISE)))])
        before = int(rng.integers(0, min(4, len(around))))
        caption = ", ".join([*around[:before], scene.caption, *around[before:]])
        found.append(replace(scene, caption=caption))
    return found


def read_free_prompts(file: Path = FREE) -> list[PromptCase]:
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    return [
        PromptCase(Scene(8, 8, (), "white", prompt, "free", named=False), SEED + number, noun=noun)
        for number, (prompt, noun) in enumerate(rows)
    ]


def make_cases(found: list[Scene], **fields: Any) -> list[PromptCase]:
    return [PromptCase(scene, SEED + number, fields) for number, scene in enumerate(found)]


def one_of_each(words: Callable[[Concept], str]) -> list[Scene]:
    return [
        Scene(8, 8, (Thing(concept, None, "alone"),), "white", f"a {words(concept)} on a white background", "one")
        for concept in KNOWN
        if words(concept)
    ]


def list_tables(count: int, steps: int) -> Iterator[tuple[str, str, list[PromptCase]]]:
    """Table, row, and what to draw for it, in `steps` steps but where steps are compared."""
    fewer: dict[str, Any] = {"num_inference_steps": steps}
    yield "things", "every thing once", make_cases(one_of_each(lambda concept: concept.name), **fewer)
    coloured = sample_scenes("coloured", count)
    rows = {
        "one thing in a colour": coloured,
        "one thing in a colour, combination held out": sample_scenes("coloured", count, held_out=True),
        "the same with 3 to 20 words of noise around": add_noise_words(coloured),
        "one thing, background held out": sample_scenes("one", count, held_out=True),
        "one thing at a place": sample_scenes("place", count),
        "two or three of a thing": sample_scenes("count", count),
        "two unlike things": sample_scenes("two", count, coloured=False),
        "two unlike things, pair held out": sample_scenes("two", count, held_out=True, coloured=False),
        "two unlike things, each in its own colour": sample_scenes("two", count, coloured=True),
        "three unlike things": sample_scenes("three", count),
        "one thing on a named scene": sample_on_scenes(count),
    }
    for name, scenes in rows.items():
        yield "kinds", name, make_cases(scenes, **fewer)
    yield "free", "main noun of 200 prompts of others", [replace(case, fields=fewer) for case in read_free_prompts()]
    few = sample_scenes("one", max(1, count // 10))
    mixed = few + sample_on_scenes(max(1, count // 10))
    for width, height in ((512, 512), (1024, 768), (768, 1024), (1440, 512), (512, 1440), (1536, 1536)):
        size = {"image_size": {"width": width, "height": height}}
        yield "sizes", f"{width}x{height}", make_cases(mixed, **size, **fewer)
    for number in (4, 8, 16, 28):
        yield "steps", str(number), make_cases(few, num_inference_steps=number)
    for scale in (1, 2, 3, 4.5, 6):
        yield "guidance", f"{scale:g}", make_cases(few, guidance_scale=scale, **fewer)
    for preset in PRESETS:
        yield "presets", preset, make_cases(few, acceleration=preset)
