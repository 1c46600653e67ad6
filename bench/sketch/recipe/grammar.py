"""The tokenizers: what a person writes becomes a few words that say what is drawn where; all else is dropped.

A tokenizer's normalizer is a chain of replacements, here in five acts. First phrases become characters of Unicode's
private use area, the longest first. Then colours are bound to their things, and whatever is no such character is
dropped. Then each thing's open mark (`OPEN`) becomes its slot. Then, for T5 alone, things are spelled: a thing becomes
its rows of pieces, and each row's mark is that of its place. Last, the pre-tokenizer drops what makes no word. So words
that the model does not know change nothing, and unmodified diffusers and transformers read prompts alike.
"""

import re
from collections.abc import Iterator, Sequence

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.sketch.recipe import phrases
from bench.sketch.recipe.concepts import BACKGROUNDS, CONCEPTS
from bench.sketch.recipe.layouts import ALONE, PLACES, SKY, SLOTS, side_of, spots_of
from bench.sketch.recipe.pieces import Pieces
from bench.sketch.recipe.words import (
    CLIP_TOKENS,
    COLOUR_CHARACTERS,
    END,
    GROUND_CHARACTERS,
    IDS,
    MARKS,
    PAD,
    REGISTERS,
    ROW_CHARACTERS,
    SLOT_CHARACTERS,
    SPECIAL,
    START,
    THING_CHARACTERS,
    TOKENS,
    piece_character,
    thing_word,
)

OPEN, MAYBE_ORANGE, LANDSCAPE = "\uf000", "\uf001", "\uf002"
RELATION_CHARACTERS = {"above": "\uf010", "below": "\uf011", "on": "\uf012"}
PLACE_CHARACTERS = {place: chr(0xF020 + number) for number, place in enumerate(PLACES)}
ROW_STARTS = [chr(0xF030 + row) for row in range(ALONE)]  # until the slot says which square that is
COUNTED = {"pair": ("left", "right"), "three": ("top", "low left", "low right")}
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
PIECE = r"[\x{F0000}-\x{FFFFD}]"
NOT_OPEN, NOT_GROUND = f"[^{OPEN}]", f"[^{GROUND[1:-1]}]"
MOST_THINGS = 3
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
    """Plain backgrounds: "on a red background", "red background", "fond rouge", "on red" before a mark or the end.

    Flags of other services go first.
    """
    yield r"(?<!\S)--?[a-z]+(?:\s+[\d:.]+)?(?=[\s,;]|$)", " "  # "--ar 3:2" counts nothing
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


def phrase_rules() -> Iterator[Rule]:
    """Phrases to characters, those of most words first, since "hot dog" is no dog."""
    things = phrases.thing_phrases(CONCEPTS)
    things["orange"].remove("orange")
    rows = [(found, OPEN + THING_CHARACTERS[name]) for name, found in things.items()]
    rows += [(["orange"], MAYBE_ORANGE), (phrases.IGNORED, " ")]
    rows += [(phrases.LANDSCAPES, LANDSCAPE)]
    rows += [(found, GROUND_CHARACTERS[name]) for name, found in phrases.SCENES.items()]
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


def binding_rules() -> Iterator[Rule]:
    """Colours to their things; what nothing is known of and what binds to nothing is dropped."""
    fixed = any_of(THING_CHARACTERS[concept.name] for concept in CONCEPTS if not concept.colourable)
    yield rf"{MAYBE_ORANGE}(?=\s+{OPEN})", COLOUR_CHARACTERS["orange"]
    yield MAYBE_ORANGE, OPEN + THING_CHARACTERS["orange"]
    for colour in COLOUR_CHARACTERS.values():  # "coeur rouge", "the heart is red"
        after = rf"{THING}(?:\s+(?:is|are|ist|sind|est|sont|es|en|in))?\s*{colour}(?!\s*{OPEN})"
        yield f"(?<!{COLOUR})(?<!{COLOUR} ){OPEN}(?={after})", colour + OPEN
    yield rf"^{NOT_GROUND}*\K{LANDSCAPE}(?!.*{GROUND})", GROUND_CHARACTERS["meadow"]
    yield rf"^[^{THING[1:-1]}{GROUND[1:-1]}]+$", DEFAULT
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
        yield rf"^(?:{NOT_OPEN}*{OPEN}{THING}){{{MOST_THINGS}}}.*?\K{COLOUR}?{OPEN}{THING}", ""
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


def counting_rules() -> Iterator[Rule]:
    """Two or three of a thing become things in slots of their own, all in the colour of the first."""
    slots = SLOT_CHARACTERS
    for count, (_, *others) in COUNTED.items():
        for concept in CONCEPTS:
            thing = THING_CHARACTERS[concept.name]
            yield f"(?<={slots[count]}){thing}", thing + "".join(slots[other] + thing for other in others)
        for colour in COLOUR_CHARACTERS.values():
            before = f"{colour}{slots[count]}."
            for other in others:
                yield f"(?<={before}){slots[other]}", colour + slots[other]
                before += f"{colour}{slots[other]}."
    for count, (first, *_) in COUNTED.items():
        yield slots[count], slots[first]


def spelling_rules(pieces: Pieces) -> Iterator[Rule]:
    """Things to rows of pieces, each after its row's mark; slots and colours are gone then."""
    sides = {side: any_of(SLOT_CHARACTERS[slot] for slot in SLOTS if side_of(slot) == side) for side in side_sizes()}
    for (name, colour, side), ids in sorted(pieces.index.items(), key=lambda item: item[0][1] is None):
        spelled = [piece_character(number - len(MARKS)) for number in ids]
        rows = (ROW_STARTS[row] + "".join(spelled[row * side : (row + 1) * side]) for row in range(side))
        before = (COLOUR_CHARACTERS[colour] if colour else "") + sides[side]
        yield f"(?<={before}){THING_CHARACTERS[name]}", "".join(rows)
    for slot, character in SLOT_CHARACTERS.items():
        if slot not in COUNTED:
            ((left, top),), side = spots_of(slot), side_of(slot)
            for row in range(side):
                gone = row * (side + 1)
                yield f"(?<={character}.{{{gone}}}){ROW_STARTS[row]}", ROW_CHARACTERS[left, top + row]
    yield any_of("".join((*SLOT_CHARACTERS.values(), *COLOUR_CHARACTERS.values()))), ""


def side_sizes() -> set[int]:
    return {side_of(slot) for slot in SLOTS}


def make_rules() -> list[Rule]:
    """What both tokenizers do first."""
    return [*backdrop_rules(), *phrase_rules(), *binding_rules(), *slot_rules()]


def make_normalizer(rules: Sequence[Rule]) -> normalizers.Normalizer:
    replacements = [normalizers.Replace(Regex(pattern), content) for pattern, content in rules]
    blanks = normalizers.Replace(Regex(r"\s+"), " ")  # a line's end would be an anchor's match
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), blanks, *replacements])


def make_clip_tokenizer() -> PreTrainedTokenizerFast:
    """It keeps the ground."""
    vocabulary = {word: number for word, number in IDS.items() if word not in ROW_CHARACTERS.values()}
    return wrap(make_rules(), vocabulary, GROUND, (START,), (END,), CLIP_TOKENS)


def make_t5_tokenizer(pieces: Pieces) -> PreTrainedTokenizerFast:
    """It spells the picture."""
    rules = [*make_rules(), *counting_rules(), *spelling_rules(pieces)]
    spelled = {piece_character(number - len(MARKS)): number for number in range(len(MARKS), len(pieces.table))}
    word = f"{GROUND}|{any_of(''.join(ROW_CHARACTERS.values()))}|{PIECE}"
    return wrap(rules, IDS | spelled, word, (), (*REGISTERS, END), TOKENS)


def wrap(
    rules: list[Rule],
    vocabulary: dict[str, int],
    word: str,
    before: tuple[str, ...],
    after: tuple[str, ...],
    length: int,
) -> PreTrainedTokenizerFast:
    """A tokenizer over that vocabulary, whose words match `word`, with special words before and after a prompt's."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = make_normalizer(rules)
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
        model_max_length=length,
    )
