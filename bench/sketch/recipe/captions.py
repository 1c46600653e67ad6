"""Tokenizers for the first edition of the model, whose text encoders learned sub-words of whole captions.

What a person writes is understood as `grammar` does, and then spelled as the captions of that training were: "please,
two fluffy kittens, 4k" becomes "two cats". Its vocabulary and weights stay as they are.

    python -m bench.sketch.recipe.captions MODEL    rewrites the tokenizers and the manifest of that folder
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, normalizers

from bench.sketch.recipe import phrases
from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS
from bench.sketch.recipe.data import LATER, with_article
from bench.sketch.recipe.grammar import (
    COLOUR,
    THING,
    Rule,
    backdrop_rules,
    binding_rules,
    make_normalizer,
    phrase_rules,
    slot_rules,
)
from bench.sketch.recipe.layouts import PLACES
from bench.sketch.recipe.words import (
    COLOUR_CHARACTERS,
    GROUND_CHARACTERS,
    SLOT_CHARACTERS,
    THING_CHARACTERS,
    thing_word,
)

RECOLOURED = [
    "apple",
    "pear",
    "mushroom",
    "cupcake",
    "bird",
    "fish",
    "butterfly",
    "tulip",
    "leaf",
    "star",
    "droplet",
    "heart",
    "balloon",
    "gift",
    "book",
    "umbrella",
    "hat",
    "shirt",
    "shoe",
    "car",
    "bus",
    "truck",
    "bicycle",
    "boat",
]
KNOWN = [concept._replace(colourable=concept.name in RECOLOURED) for concept in CONCEPTS[:LATER]]
LEARNED_COLOURS = [colour for colour in COLOURS if colour not in {"brown", "black", "white"}]
MOST_THINGS = 2
# What is drawn of a prompt of which nothing is known.
DEFAULT = thing_word("rainbow", "alone") + GROUND_CHARACTERS["blue"]
JOINED = {
    "right": ("left", " and "),
    "bottom": ("top", " above "),
    "top": ("bottom", " and "),
}  # the second's slot: the first's, what is between


def spelling_rules() -> Iterator[Rule]:
    """Words to captions."""
    slots, counts = SLOT_CHARACTERS, SLOT_CHARACTERS["pair"] + SLOT_CHARACTERS["three"]
    yield f"{COLOUR}(?=[{counts}])", ""  # counts were never trained with colours
    for colour in COLOURS:
        if colour not in LEARNED_COLOURS:
            yield COLOUR_CHARACTERS[colour], ""
    for second, (first, between) in JOINED.items():
        yield f"(?<={slots[first]}{THING})(?={COLOUR}?{slots[second]})", between
        yield rf"{slots[first]}(?={THING}{between})", slots["alone"]
        yield rf"(?<={between}){slots[second]}", slots["alone"]
        yield rf"(?<={between}{COLOUR}){slots[second]}", slots["alone"]
    for place in PLACES:
        yield f"(?<={slots[place]}{THING})", f" {'on' if place in ('left', 'right') else 'at'} the {place}"
        yield slots[place], slots["alone"]
    yield from article_rules()
    for concept in KNOWN:
        yield f"(?<=[{counts}]){THING_CHARACTERS[concept.name]}", concept.plural
        yield THING_CHARACTERS[concept.name], concept.name
    yield slots["pair"], "two "
    yield slots["three"], "three "
    for name in BACKGROUNDS:
        yield GROUND_CHARACTERS[name], f" on {with_article(name)} background"


def article_rules() -> Iterator[Rule]:
    """ "a red apple", "an apple", "a cat"."""
    alone = SLOT_CHARACTERS["alone"]
    for colour in LEARNED_COLOURS:
        yield COLOUR_CHARACTERS[colour] + alone, with_article(colour) + " "
    vowels = "".join(THING_CHARACTERS[concept.name] for concept in KNOWN if with_article(concept.name)[1] == "n")
    yield f"{alone}(?=[{vowels}])", "an "
    yield alone, "a "


def make_caption_normalizer() -> normalizers.Normalizer:
    rules = [*backdrop_rules(), *phrase_rules(KNOWN, {}), *binding_rules(KNOWN, DEFAULT, MOST_THINGS), *slot_rules()]
    return make_normalizer([*rules, *spelling_rules()])


def rewrite(model: Path) -> None:
    """Give the tokenizers of the first edition in `model` this normalizer, and its manifest the words they know."""
    for name in "tokenizer", "tokenizer_2":
        file = model / name / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.normalizer = make_caption_normalizer()
        tokenizer.save(str(file))
    manifest = json.loads((model / "manifest.json").read_text())
    manifest["knows"]["words"] = " ".join(phrases.list_words(KNOWN, {}))
    (model / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]))
