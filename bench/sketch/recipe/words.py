"""The words the model reads, after the tokenizers' normalizer has made them of a prompt (see `grammar`).

T5 reads a picture's spelling: for each row of a thing's square the mark of the place where the row begins, then the
row's pieces from left to right, each 64 by 64 pixels of the thing's picture; and the ground. CLIP reads the ground
alone. Things, colours and slots are parts of words, which the normalizer replaces on its way. All of them are
characters of Unicode's private use areas.
"""

from itertools import product

from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS, SCENES
from bench.sketch.recipe.layouts import CANVAS, SLOTS

PAD, END, START, NOTHING = "<pad>", "<|endoftext|>", "<|startoftext|>", "<nothing>"
REGISTERS = tuple(f"<register{number}>" for number in range(4))  # after every prompt: the same for all of them
SPECIAL = (PAD, END, START, NOTHING, *REGISTERS)
GROUNDS = (*BACKGROUNDS, *SCENES)
TOKENS = 72  # of T5: three things of four rows, a ground, the registers, the end
CLIP_TOKENS = 8
THING_CHARACTERS = {concept.name: chr(0xE000 + number) for number, concept in enumerate(CONCEPTS)}
COLOUR_CHARACTERS = {colour: chr(0xE800 + number) for number, colour in enumerate(COLOURS)}
GROUND_CHARACTERS = {ground: chr(0xE900 + number) for number, ground in enumerate(GROUNDS)}
SLOT_CHARACTERS = {slot: chr(0xEA00 + number) for number, slot in enumerate(SLOTS)}
ROW_CHARACTERS = {spot: chr(0xEB00 + number) for number, spot in enumerate(product(range(CANVAS), range(CANVAS)))}
FIRST_PIECE = 0xF0000
# The vocabulary but for the pieces, whose ids follow. A row's mark is named by its left and top square.
MARKS = (*SPECIAL, *GROUND_CHARACTERS.values(), *ROW_CHARACTERS.values())
IDS = {word: number for number, word in enumerate(MARKS)}


def thing_word(name: str, slot: str, colour: str | None = None) -> str:
    return (COLOUR_CHARACTERS[colour] if colour else "") + SLOT_CHARACTERS[slot] + THING_CHARACTERS[name]


def piece_character(number: int) -> str:
    return chr(FIRST_PIECE + number)
