"""The text side: a tiny CLIP, trained with the transformer, and a tiny T5 encoder that learns to spell, before it.

T5's rows say what pieces look like (see `pieces`). Its layers tell each piece where it goes: the row's mark before it
says where the row begins, and the piece's own number how far along it is. That is learned in minutes, for every
picture alike, and is then left as it is.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench.sketch.recipe.layouts import ALONE, AMONG, CANVAS
from bench.sketch.recipe.pieces import COLUMN, CONTENT, OFFSET, ROW, WIDTH, Alphabet, Pieces, pad
from bench.sketch.recipe.training import SeededGenerator, Stage, load_averaged_weights, train
from bench.sketch.recipe.words import (
    CLIP_TOKENS,
    END,
    GROUND_CHARACTERS,
    IDS,
    MARKS,
    PAD,
    REGISTERS,
    ROW_CHARACTERS,
    START,
    TOKENS,
)

CLIP_WIDTH = 128
BATCH = 16
SIDES = (2, 3, AMONG, AMONG, AMONG, 5, ALONE, ALONE)  # sides of what is spelled, more than are drawn today
ROOM = TOKENS - len(REGISTERS) - 2  # a ground and the end
PLACES_WEIGH = 10.0  # where a piece goes, against what it looks like
Square = tuple[int, int]  # row and column of a token


def make_clip() -> CLIPTextModel:
    """2 layers, which read the ground."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(MARKS) - len(ROW_CHARACTERS),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=IDS[START],
            eos_token_id=IDS[END],
            pad_token_id=IDS[PAD],
        )
    )


def make_clip_ids(words: list[str]) -> list[int]:
    """As its tokenizer makes and FluxPipeline pads them."""
    ids = [IDS[word] for word in (START, *words, END)]
    return ids + [IDS[PAD]] * (CLIP_TOKENS - len(ids))


def make_t5(table: torch.Tensor, seed: int) -> T5EncoderModel:
    """2 layers over the given rows, which are not trained."""
    torch.manual_seed(seed)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(table),
            d_model=WIDTH,
            d_kv=32,
            d_ff=512,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            eos_token_id=IDS[END],
            pad_token_id=IDS[PAD],
        )
    )
    set_rows(t5, table)
    return t5


def trained_part(t5: T5EncoderModel) -> torch.nn.ModuleDict:
    """All but the rows."""
    return torch.nn.ModuleDict({"block": t5.encoder.block, "final_layer_norm": t5.encoder.final_layer_norm})


def load_t5(file: Path, table: torch.Tensor) -> T5EncoderModel:
    """T5 as the stage `text` left it, over these rows."""
    t5 = make_t5(table, 0)
    trained_part(t5).load_state_dict(load_averaged_weights(file))
    return t5.eval().requires_grad_(False)


def read_t5(folder: Path, table: torch.Tensor) -> T5EncoderModel:
    """T5 of an edition's folder, over these rows."""
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32, local_files_only=True)
    set_rows(t5, table)
    return t5.eval().requires_grad_(False)


def set_rows(t5: T5EncoderModel, table: torch.Tensor) -> None:
    words, width = table.shape
    rows = torch.nn.Embedding(words, width, _weight=table)
    t5.set_input_embeddings(rows.requires_grad_(False))
    t5.config.vocab_size = len(table)


def sample(rng: np.random.Generator, pieces: Pieces) -> tuple[list[int], list[Square | None]]:
    """Ids of things anywhere, and for each id the square that the piece belongs on."""
    ids, squares, drawn = list[int](), list[Square | None](), list(pieces.index)
    while True:
        side = int(rng.choice(SIDES))
        if len(ids) + side * (side + 1) > ROOM:
            break
        whole = ALONE if side > AMONG else AMONG
        name, colour, _ = drawn[int(rng.integers(len(drawn)))]
        found = pieces.index[name, colour, whole]
        left, top = (int(rng.integers(0, CANVAS + 1 - side)) for _ in range(2))
        for row in range(side):
            ids += [IDS[ROW_CHARACTERS[left, top + row]], *found[row * whole : row * whole + side]]
            squares += [None, *((top + row, left + column) for column in range(side))]
        if rng.random() < 0.4:
            break
    if rng.random() < 0.8:
        grounds = list(GROUND_CHARACTERS.values())
        place = 0 if rng.random() < 0.5 else len(ids)
        ids.insert(place, IDS[grounds[int(rng.integers(len(grounds)))]])
        squares.insert(place, None)
    return pad(ids), squares + [None] * (TOKENS - len(squares))


def wanted_states(
    table: torch.Tensor, ids: torch.Tensor, squares: list[list[Square | None]], unit: float
) -> torch.Tensor:
    """What T5 is to make of each row: contents as they are, the square one-hot; nothing of a row's mark."""
    wanted = table[ids].clone()
    wanted[..., ROW:OFFSET] = 0
    wanted[torch.isin(ids, torch.tensor([IDS[mark] for mark in ROW_CHARACTERS.values()]))] = 0
    for number, line in enumerate(squares):
        for place, square in enumerate(line):
            if square is not None:
                wanted[number, place, [ROW + square[0], COLUMN + square[1]]] = unit
    return wanted


def train_text(
    out: Path, pieces: Pieces, alphabet: Alphabet, minutes: float, seed: int, limit: int | None = None, lr: float = 2e-3
) -> list[float]:
    """Teach T5 where pieces go, for `minutes` in all, or `limit` steps. Returns the losses of this run."""
    t5 = make_t5(pieces.table, seed)
    layers = trained_part(t5)
    scale, generator = alphabet.norm / WIDTH**0.5, SeededGenerator(seed)

    def loss_at(_progress: float, step: int) -> torch.Tensor:
        rng = generator.at(step)
        lines, squares = zip(*(sample(rng, pieces) for _ in range(BATCH)), strict=True)
        ids = torch.tensor(lines)
        wanted = wanted_states(pieces.table, ids, list(squares), alphabet.unit)
        error = (t5(ids)[0] * scale - wanted).pow(2)
        loss: torch.Tensor = error[..., :CONTENT].mean() + PLACES_WEIGH * error[..., ROW:OFFSET].mean()
        return loss

    optimizer = torch.optim.AdamW(layers.parameters(), lr, weight_decay=0.0)
    stage = Stage("text", out / "text.ckpt", layers, [optimizer], lr, 50, 0.98, minutes, limit)
    return train(stage, loss_at, "loss {:.4f}".format)
