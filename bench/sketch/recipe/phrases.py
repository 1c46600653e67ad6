"""How people write what the model can draw: every phrase that the tokenizer turns into a part of a word.

English names and synonyms are in concepts.txt; the scenes, colours, counts, places and the commonest words of German,
French, Spanish and Chinese in phrases.toml.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from bench.sketch.recipe.concepts import CONCEPTS, Concept


def read_rows(section: str) -> dict[str, list[str]]:
    """The phrases for each name of a section of phrases.toml."""
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())[section]
    return {name: phrases.split(", ") for name, phrases in rows.items()}


COLOURS = read_rows("colours")
SCENES = read_rows("scenes")
COUNTS = read_rows("counts")
PLACES = read_rows("places")
RELATIONS = read_rows("relations")
OTHER = read_rows("other")
LANDSCAPES = OTHER["landscape"]  # drawn where no scene is named
# Phrases whose parts would be taken for something else.
IGNORED = OTHER["ignored"]
BACKDROPS = OTHER["backdrop"]
FOREIGN = read_rows("foreign")
# Styles and filler: they ask for nothing that is drawn, so they need not be named as unknown.
SILENT = set(OTHER["silent"])


def plurals(concept: Concept) -> list[str]:
    return [concept.plural, *(Concept(name, "").plural for name in concept.other)]


def thing_phrases(known: Sequence[Concept]) -> dict[str, list[str]]:
    """Every way to write each thing; where two things claim a phrase, the first keeps it, a plural made here last."""
    written = {concept.name: [concept.name, *concept.other, *FOREIGN.get(concept.name, [])] for concept in known}
    made = {
        concept.name: plurals(concept)
        + [f"{name}s" for name in FOREIGN.get(concept.name, []) if name.isascii() and not name.endswith("s")]
        for concept in known
    }
    owners: dict[str, str] = {}
    for rows in written, made:
        for name, phrases in rows.items():
            for phrase in phrases:
                owners.setdefault(phrase, name)
    return {
        name: [phrase for phrase in dict.fromkeys(phrases + made[name]) if owners[phrase] == name]
        for name, phrases in written.items()
    }


def list_words() -> list[str]:
    """Every word that is read, or silently passed over: a prompt's other words are those the model does not know."""
    tables = (
        thing_phrases(CONCEPTS),
        COLOURS,
        SCENES,
        COUNTS,
        PLACES,
        RELATIONS,
        {"": [*BACKDROPS, *LANDSCAPES, *IGNORED]},
    )
    found = [phrase for table in tables for row in table.values() for phrase in row]
    return sorted(SILENT.union(*(re.split(r"[\s_-]+", phrase.lower()) for phrase in found)))
