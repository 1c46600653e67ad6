"""The words the model reads, after the tokenizer's normalizer has made them of a prompt (see `grammar`).

A word is a thing together with its colour and its slot, or a ground. Each kind of part has characters of Unicode's
private use area. An embedding row is the sum of its parts' rows, so that combinations
are known that were never trained on.
"""

from itertools import product

import torch

from bench.sketch.recipe.concepts import BACKGROUNDS, COLOURS, CONCEPTS, SCENES
from bench.sketch.recipe.layouts import SLOTS

PAD, END, START, NOTHING = "<pad>", "<|endoftext|>", "<|startoftext|>", "<nothing>"
REGISTERS = tuple(f"<register{number}>" for number in range(6))  # after every prompt: the same for all of them
SPECIAL = (PAD, END, START, NOTHING, *REGISTERS)
TOKENS = 12  # three things, a ground, the registers, the marks
GROUNDS = (*BACKGROUNDS, *SCENES)
THING_CHARACTERS = {concept.name: chr(0xE000 + number) for number, concept in enumerate(CONCEPTS)}
COLOUR_CHARACTERS = {colour: chr(0xE800 + number) for number, colour in enumerate(COLOURS)}
GROUND_CHARACTERS = {ground: chr(0xE900 + number) for number, ground in enumerate(GROUNDS)}
SLOT_CHARACTERS = {slot: chr(0xEA00 + number) for number, slot in enumerate(SLOTS)}


def thing_word(name: str, slot: str, colour: str | None = None) -> str:
    return (COLOUR_CHARACTERS[colour] if colour else "") + SLOT_CHARACTERS[slot] + THING_CHARACTERS[name]


def list_vocabulary() -> dict[str, tuple[str, ...]]:
    """Every word, in the order of its id, and the parts its row is the sum of."""
    words: dict[str, tuple[str, ...]] = {word: (word,) for word in SPECIAL}
    words |= {GROUND_CHARACTERS[ground]: (f"ground {ground}",) for ground in GROUNDS}
    for concept, slot in product(CONCEPTS, SLOTS):
        parts = (f"thing {concept.name}", f"slot {slot}")
        words[thing_word(concept.name, slot)] = parts
        for colour in COLOURS if concept.colourable else ():
            words[thing_word(concept.name, slot, colour)] = (*parts, f"colour {colour}")
    return words


VOCABULARY = list_vocabulary()
IDS = {word: number for number, word in enumerate(VOCABULARY)}
PARTS = {part: number for number, part in enumerate(dict.fromkeys(p for ps in VOCABULARY.values() for p in ps))}


class SummedEmbedding(torch.nn.Module):
    """An embedding whose rows are sums of the rows of their parts."""

    def __init__(self, width: int, deviation: float) -> None:
        super().__init__()
        self.parts = torch.nn.Parameter(torch.randn(len(PARTS), width) * deviation)
        none = len(PARTS)
        rows = [[PARTS[part] for part in parts] + [none] * (3 - len(parts)) for parts in VOCABULARY.values()]
        self.rows: torch.Tensor
        self.register_buffer("rows", torch.tensor(rows), persistent=False)

    def table(self) -> torch.Tensor:
        """All rows, `(words, width)`."""
        return self.forward(torch.arange(len(VOCABULARY), device=self.parts.device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([self.parts, torch.zeros_like(self.parts[:1])])
        summed: torch.Tensor = padded[self.rows[ids]].sum(-2)
        return summed
