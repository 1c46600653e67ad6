"""The pieces that T5 spells things with: a row of its embedding holds what a piece looks like, set and not trained.

A piece is one token of a thing's picture, 64 by 64 pixels in one of the thing's sizes and colours. Its row begins with
the piece's latents over white less white's own, 128 numbers as FluxPipeline packs them; then come the principal
components of what shows through it. So a thing that is added to the list needs no training: it is other rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from bench.sketch.recipe.codec import CHANNELS, Stamps
from bench.sketch.recipe.concepts import COLOURS, Concept
from bench.sketch.recipe.data import TOKEN, Scene, Thing
from bench.sketch.recipe.layouts import ALONE, AMONG, CANVAS, Spot
from bench.sketch.recipe.words import (
    END,
    GROUND_CHARACTERS,
    IDS,
    MARKS,
    PAD,
    REGISTERS,
    ROW_CHARACTERS,
    TOKENS,
)

LOOK = 4 * CHANNELS  # numbers of a piece's latents
THROUGH = 48  # components of what shows through: 98 % of its variance
CONTENT = LOOK + THROUGH
# Where a row says more: one-hot, the canvas' row and column that a token is for, the column within its thing, its kind.
ROW, COLUMN = CONTENT, CONTENT + CANVAS
OFFSET = COLUMN + CANVAS
KIND = OFFSET + ALONE
WIDTH = 224
LEVEL = WIDTH - 1  # holds what a row lacks of the common norm, so that T5's norms scale all rows alike
Drawn = tuple[Concept, str | None, int]  # the thing, its colour if changed, tokens of a side


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`(32, 2 h, 2 w)` to `(h w, 128)`, as FluxPipeline packs them."""
    channels, height, width = latents.shape
    tokens = latents.view(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    return tokens.reshape(height * width // 4, 4 * channels)


@dataclass(frozen=True)
class Alphabet:
    """What the rows of all pieces and marks have in common. It stays when things are added.

    `through` are the components of what shows through a piece, `(3 * 128, 48)`; `marks` the contents of the other
    words but the rows' marks, `(words, 176)`; `unit` the size of a one-hot number; `norm` that of every row.
    """

    through: torch.Tensor
    marks: torch.Tensor
    unit: float
    norm: float

    @classmethod
    def fit(cls, stamps: Stamps, concepts: Sequence[Concept], seed: int) -> "Alphabet":
        seen = [cut(stamps, *drawn) for drawn in list_drawn(concepts)]
        looks, throughs = (torch.cat(part) for part in zip(*seen, strict=True))
        _, vectors = torch.linalg.eigh(throughs.T @ throughs)
        through = 0.5 * vectors[:, -THROUGH:].flip(1)
        contents = torch.cat([looks, throughs @ through], 1).norm(dim=1)
        size = float(np.quantile(contents.numpy(), 0.999))
        generator = torch.Generator().manual_seed(seed)
        count = len(MARKS) - len(ROW_CHARACTERS)
        marks = torch.randn(count, CONTENT, generator=generator) * 0.7 * size / CONTENT**0.5
        return cls(through, marks, size / 4, (size**2 + 3 * (size / 4) ** 2) ** 0.5)

    @classmethod
    @torch.no_grad()
    def of(cls, folder: Path, stamps: Stamps, concepts: Sequence[Concept]) -> "Alphabet":
        """That of an edition's folder, by what its tokenizer makes of the concepts and its T5's rows hold of them."""
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
        t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32, local_files_only=True)
        table = t5.get_input_embeddings().weight
        throughs, found = list[torch.Tensor](), list[torch.Tensor]()
        for concept in concepts:
            ids = torch.tensor(tokenizer(f"a {concept.name}", add_special_tokens=False).input_ids)
            found.append(table[ids[ids >= len(MARKS)], LOOK:CONTENT])
            throughs.append(cut(stamps, concept, None, ALONE)[1])
        through = torch.linalg.lstsq(torch.cat(throughs), torch.cat(found)).solution
        marks = table[: len(MARKS) - len(ROW_CHARACTERS)]
        return cls(through, marks[:, :CONTENT].clone(), float(marks[0, KIND + 2]), float(marks[0].norm()))

    def save(self, path: Path) -> None:
        sizes = torch.tensor([self.unit, self.norm])
        save_file({"through": self.through.contiguous(), "marks": self.marks, "sizes": sizes}, path)

    @classmethod
    def load(cls, path: Path) -> "Alphabet":
        kept = load_file(path)
        unit, norm = kept["sizes"].tolist()
        return cls(kept["through"], kept["marks"], unit, norm)


def list_drawn(concepts: Iterable[Concept]) -> list[Drawn]:
    return [
        (concept, colour, side)
        for concept in concepts
        for colour in (None, *(COLOURS if concept.colourable else ()))
        for side in (AMONG, ALONE)
    ]


def cut(stamps: Stamps, concept: Concept, colour: str | None, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A thing's pieces: their latents over white less white's, `(side * side, 128)`, and what shows through them.

    The latter is `(side * side, 3 * 128)`: what the latents lose for each channel of the ground, less what a piece does
    of which nothing is drawn.
    """
    maps, code = stamps.maps(concept, colour, side * TOKEN), stamps.codec
    black = code.encode(np.zeros((TOKEN, TOKEN, 3), np.float32))
    channels = [code.encode(np.ones((TOKEN, TOKEN, 3), np.float32) * channel) - black for channel in np.eye(3)]
    empty = torch.cat([pack(channel)[0] for channel in channels])
    white = pack(black + sum(channels))[0]
    look = pack(maps.sum(0) + stamps.codec.offset[:, None, None]) - white
    return look, torch.cat([pack(part) for part in maps[1:]], 1) - empty


class Pieces:
    """Every piece of the concepts in their sizes and colours, equal ones once.

    `table` are T5's rows, marks and pieces, `(words, 224)`; `index` the ids of a thing's pieces, row by row.
    """

    def __init__(self, stamps: Stamps, alphabet: Alphabet, concepts: Sequence[Concept]) -> None:
        rows, numbers = list[torch.Tensor](), dict[bytes, int]()
        self.index: dict[tuple[str, str | None, int], list[int]] = {}
        for concept, colour, side in list_drawn(concepts):
            look, through = cut(stamps, concept, colour, side)
            contents, ids = torch.cat([look, through @ alphabet.through], 1), list[int]()
            self.index[concept.name, colour, side] = ids
            for place, content in enumerate(contents):
                column = place % side
                equal = (content * 8).round().to(torch.int16).numpy().tobytes() + bytes([column])
                if equal not in numbers:
                    numbers[equal] = len(MARKS) + len(numbers)
                    row = torch.zeros(WIDTH)
                    row[:CONTENT], row[OFFSET + column], row[KIND + 1] = content, alphabet.unit, alphabet.unit
                    rows.append(row)
                ids.append(numbers[equal])
        self.table = torch.cat([make_marks(alphabet), torch.stack(rows)])
        self.table[:, LEVEL] = (alphabet.norm**2 - (self.table**2).sum(1)).clamp(min=0).sqrt()

    def spell(self, scene: Scene) -> list[int]:
        """T5's ids of a scene, without registers, end and padding."""
        ids = [word for thing in scene.things for spot in thing.spots for word in self._at(thing, spot)]
        return ids + ([IDS[GROUND_CHARACTERS[scene.background]]] if scene.named else [])

    def _at(self, thing: Thing, spot: Spot) -> list[int]:
        pieces, side = self.index[thing.concept.name, thing.colour, thing.side], thing.side
        rows = (pieces[row * side : (row + 1) * side] for row in range(side))
        marks = (IDS[ROW_CHARACTERS[spot[0], spot[1] + row]] for row in range(side))
        return [word for mark, row in zip(marks, rows, strict=True) for word in (mark, *row)]


def make_marks(alphabet: Alphabet) -> torch.Tensor:
    """The rows of all words that are no pieces, but for their `LEVEL`."""
    table = torch.zeros(len(MARKS), WIDTH)
    table[: len(alphabet.marks), :CONTENT] = alphabet.marks
    table[: len(alphabet.marks), KIND + 2] = alphabet.unit
    for (left, top), character in ROW_CHARACTERS.items():
        table[IDS[character], [ROW + top, COLUMN + left, KIND]] = alphabet.unit
    return table


def pad(ids: list[int]) -> list[int]:
    """T5's ids as its tokenizer ends and FluxPipeline pads them."""
    whole = [*ids, *(IDS[register] for register in REGISTERS), IDS[END]]
    assert len(whole) <= TOKENS, f"{len(whole)} tokens"
    return whole + [IDS[PAD]] * (TOKENS - len(whole))
