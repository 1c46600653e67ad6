"""The tokenizers: what a person writes becomes a few words that say what is drawn where; all else is dropped.

A tokenizer's normalizer is a chain of replacements, here in four acts. First phrases become characters of Unicode's
private use area, the longest first. Then colours are bound to their things, and whatever is no such character is
dropped. Then each thing's open mark (`OPEN`) becomes its slot. Last, the pre-tokenizer drops what makes no word.
So words that the model does not know change nothing, and unmodified diffusers and transformers read prompts alike.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.sketch.recipe import phrases
from bench.sketch.recipe.concepts import BACKGROUNDS, TAUGHT, Concept
from bench.sketch.recipe.layouts import PLACES, SKY
from bench.sketch.recipe.words import (
    COLOUR_CHARACTERS,
    END,
    GROUND_CHARACTERS,
    IDS,
    PAD,
    REGISTERS,
    SLOT_CHARACTERS,
    SPECIAL,
    START,
    THING_CHARACTERS,
    TOKENS,
    thing_word,
)

OPEN, MAYBE_ORANGE, LANDSCAPE = "\uf000", "\uf001", "\uf002"
RELATION_CHARACTERS = {"above": "\uf010", "below": "\uf011", "on": "\uf012"}
PLACE_CHARACTERS = {place: chr(0xF020 + number) for number, place in enumerate(PLACES)}
PASSES = 5  # a replacement that is anchored at the start finds one place a pass
NOT_A_LETTER = r"[^\x{E000}-\x{F8FF}]"
Rule = tuple[str, str]  # a regular expression, and what replaces it


def any_of(characters: Iterator[str] | dict[str, str] | str) -> str:
    values = characters.values() if isinstance(characters, dict) else characters
    return "[" + "".join(sorted(values)) + "]"


THING, COLOUR, GROUND, SLOT = map(any_of, (THING_CHARACTERS, COLOUR_CHARACTERS, GROUND_CHARACTERS, SLOT_CHARACTERS))
COUNT = any_of(SLOT_CHARACTERS["pair"] + SLOT_CHARACTERS["three"])
SCENE = any_of(character for name, character in GROUND_CHARACTERS.items() if name not in BACKGROUNDS)
FLYING = any_of(THING_CHARACTERS[name] for name in SKY)
NOT_OPEN, NOT_GROUND = f"[^{OPEN}]", f"[^{GROUND[1:-1]}]"
# What is drawn of a prompt of which nothing is known.
DEFAULT = thing_word("rainbow", "top") + thing_word("house", "low left") + thing_word("tree", "low right")
DEFAULT += GROUND_CHARACTERS["meadow"]


def phrase_pattern(found: list[str]) -> str:
    """Matches any of the phrases as whole words; between their parts may be blanks, hyphens or nothing."""
    latin = [phrase for phrase in found if phrase.isascii() or any("\u00c0" <= mark <= "\u024f" for mark in phrase)]
    parts = [re.sub(r"(\\ |\\-)", r"[\\s_-]*", re.escape(phrase)) for phrase in sorted(latin, key=len, reverse=True)]
    patterns = [rf"(?<![\p{{L}}\p{{N}}])(?:{'|'.join(parts)})(?![\p{{L}}\p{{N}}])"] if parts else []
    other = sorted((phrase for phrase in found if phrase not in latin), key=len, reverse=True)
    return "|".join(patterns + other)


def backdrop_rules() -> Iterator[Rule]:
    """Plain backgrounds: "on a red background", "red background", "fond rouge", "on red" before a mark or the end."""
    before = r"(?:(?<![\p{L}\p{N}])(?:on|against|over|with|in front of|in|auf|vor|mit|sur|sobre|con)\s+)?"
    article = r"(?:(?<![\p{L}\p{N}])(?:an?|the|einem|einen|un|une|plain|solid|bright|dark|light|pure)\s+)*"
    for name in BACKGROUNDS:
        colour = phrase_pattern(phrases.COLOURS[name] + (["orange"] if name == "orange" else []))
        ground = "|".join(phrases.BACKDROPS)
        yield f"{before}{article}(?:{colour})(?:,?\\s*)(?:{ground})", GROUND_CHARACTERS[name]
        yield (
            rf"{before}{article}(?:fond|fondo|background|hintergrund)\s+(?:is\s+)?(?:{colour})",
            GROUND_CHARACTERS[name],
        )
        yield rf"(?<![\p{{L}}\p{{N}}])on\s+(?:{colour})(?=\s*(?:$|[^\s\p{{L}}\p{{N}}-]))", GROUND_CHARACTERS[name]


def phrase_rules(known: Sequence[Concept], scenes: Mapping[str, list[str]]) -> Iterator[Rule]:
    """Phrases to characters, those of most words first, since "hot dog" is no dog."""
    things = phrases.thing_phrases(known)
    things["orange"].remove("orange")
    rows = [(found, OPEN + THING_CHARACTERS[name]) for name, found in things.items()]
    rows += [(["orange"], MAYBE_ORANGE), (phrases.IGNORED, " ")]
    rows += [(phrases.LANDSCAPES, LANDSCAPE)] if scenes else []
    rows += [(found, GROUND_CHARACTERS[name]) for name, found in scenes.items()]
    rows += [(found, COLOUR_CHARACTERS[name]) for name, found in phrases.COLOURS.items()]
    rows += [(found, SLOT_CHARACTERS[name]) for name, found in phrases.COUNTS.items()]
    rows += [(found, PLACE_CHARACTERS[name]) for name, found in phrases.PLACES.items()]
    rows += [(found, RELATION_CHARACTERS[name]) for name, found in phrases.RELATIONS.items()]

    def length(phrase: str) -> int:
        """In words; a Chinese character counts as a word."""
        return max(len(re.split(r"[\s_-]+", phrase)), len(re.findall(r"[\u4e00-\u9fff]", phrase)))

    for words in range(max(length(phrase) for found, _ in rows for phrase in found), 0, -1):
        for found, character in rows:
            chosen = [phrase for phrase in found if length(phrase) == words]
            if chosen:
                yield phrase_pattern(chosen), character


def binding_rules(known: Sequence[Concept], default: str, most_things: int = 3) -> Iterator[Rule]:
    """Colours to their things; what nothing is known of and what binds to nothing is dropped."""
    fixed = any_of(THING_CHARACTERS[concept.name] for concept in known if not concept.colourable)
    yield rf"{MAYBE_ORANGE}(?=\s+{OPEN})", COLOUR_CHARACTERS["orange"]
    yield MAYBE_ORANGE, OPEN + THING_CHARACTERS["orange"]
    for colour in COLOUR_CHARACTERS.values():  # "coeur rouge", "the heart is red"
        after = rf"{THING}(?:\s+(?:is|are|ist|sind|est|sont|es|en|in))?\s*{colour}(?!\s*{OPEN})"
        yield f"(?<!{COLOUR})(?<!{COLOUR} ){OPEN}(?={after})", colour + OPEN
    yield rf"^{NOT_GROUND}*\K{LANDSCAPE}(?!.*{GROUND})", GROUND_CHARACTERS["meadow"]
    yield rf"^[^{THING[1:-1]}{GROUND[1:-1]}]+$", default
    yield NOT_A_LETTER, ""
    yield f"{COLOUR}(?!{OPEN})", ""
    yield f"{COLOUR}(?={OPEN}{fixed})", ""
    yield f"{COUNT}(?!{COLOUR}?{OPEN})", ""
    yield f"{RELATION_CHARACTERS['on']}(?!{COUNT}?{COLOUR}?{OPEN})", ""
    yield f"(?<!{THING}){RELATION_CHARACTERS['on']}", ""
    yield RELATION_CHARACTERS["on"], RELATION_CHARACTERS["above"]
    for _ in range(PASSES):
        yield rf"^.*?{OPEN}({THING}).*?\K(?<!{COLOUR}){OPEN}\1", ""
        yield rf"^.*?({COLOUR}{OPEN}{THING}).*?\K\1", ""
        yield rf"^(?:{NOT_OPEN}*{OPEN}{THING}){{{most_things}}}.*?\K{COLOUR}?{OPEN}{THING}", ""
        yield rf"^{NOT_GROUND}*{GROUND}{NOT_GROUND}*\K{GROUND}", ""


def slot_rules() -> Iterator[Rule]:
    """Each open mark becomes a slot, as `layouts.assign_slots` says; a count becomes the slot of its thing."""
    slots, rest = SLOT_CHARACTERS, NOT_OPEN + "*"
    on_scene = f"(?=.*{SCENE})"

    def exactly(count: int) -> str:
        return f"(?=(?:{rest}{OPEN}){{{count}}}{rest}$)"

    def first(*conditions: str) -> str:
        """The first open mark of a prompt for which all conditions hold."""
        return f"^{''.join(conditions)}{rest}\\K{OPEN}"

    def beside(slot: str) -> str:
        """The last open mark, where another thing has that slot."""
        return first(exactly(1), f"(?=.*{slots[slot]})")

    for _ in range(PASSES):
        yield rf"^(?={rest}{OPEN}{rest}{OPEN}).*?\K{COUNT}", ""
    for count in "pair", "three":
        yield slots[count] + OPEN, slots[count]
        for colour in COLOUR_CHARACTERS.values():
            yield slots[count] + colour + OPEN, colour + slots[count]
    for before in range(3):
        yield f"^{exactly(3)}(?:{rest}{OPEN}){{{before}}}{rest}\\K{OPEN}(?={FLYING})", slots["top"]
    yield first(exactly(3)), slots["top"]
    yield first(exactly(2), f"(?=.*{slots['top']})"), slots["low left"]
    yield beside("low left"), slots["low right"]
    for place, character in PLACE_CHARACTERS.items():
        yield first(exactly(1), f"(?=.*{character})"), slots[place]
    for relation, slot, other in ("above", "top", "bottom"), ("below", "bottom", "top"):
        yield first(exactly(2), f"(?={rest}{OPEN}{rest}{RELATION_CHARACTERS[relation]})"), slots[slot]
        yield beside(slot), slots[other]
    yield first(exactly(2), on_scene) + f"(?={FLYING}{rest}{OPEN}(?!{FLYING}))", slots["top"]
    yield beside("top"), slots["bottom"]
    yield first(exactly(2), on_scene) + f"(?=(?!{FLYING}).{rest}{OPEN}{FLYING})", slots["bottom"]
    yield beside("bottom"), slots["top"]
    yield first(exactly(2), on_scene), slots["low left"]
    yield beside("low left"), slots["low right"]
    yield first(exactly(1), on_scene) + f"(?={FLYING})", slots["top"]
    yield first(exactly(1), on_scene), slots["bottom"]
    yield first(exactly(2)), slots["left"]
    yield beside("left"), slots["right"]
    yield OPEN, slots["alone"]
    yield any_of("".join((*RELATION_CHARACTERS.values(), *PLACE_CHARACTERS.values()))), ""


def make_rules() -> list[Rule]:
    return [
        *backdrop_rules(),
        *phrase_rules(TAUGHT, phrases.SCENES),
        *binding_rules(TAUGHT, DEFAULT),
        *slot_rules(),
    ]


def make_normalizer(rules: Sequence[Rule]) -> normalizers.Normalizer:
    replacements = [normalizers.Replace(Regex(pattern), content) for pattern, content in rules]
    blanks = normalizers.Replace(Regex(r"\s+"), " ")  # a line's end would be an anchor's match
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), blanks, *replacements])


def make_tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """CLIP's (start and end marks) and T5's (the registers and an end mark), over the same vocabulary."""

    normalizer = make_normalizer(make_rules())

    def wrap(before: tuple[str, ...], after: tuple[str, ...]) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token=PAD))
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.normalizer = normalizer
        word = f"{COLOUR}?{SLOT}{THING}|{GROUND}"
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "removed", invert=True)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(mark, IDS[mark]) for mark in (*before, *after)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=START,
            eos_token=END,
            pad_token=PAD,
            unk_token=PAD,
            model_max_length=TOKENS,
        )

    return wrap((START,), (END,)), wrap((), (*REGISTERS, END))
