"""The checkpoints this server can serve: one row a model.

A row knows where its files lie under the models folder, how many text tokens the model was made for, and under which
licence it comes. Locating reads names and sizes only; `weights.load` reads the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights.errors import MissingFiles
from weights.previews import FLUX, PreviewMap

COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model.

    `folder` holds the pipeline in diffusers layout; `transformer`, where set, is the single safetensors file that
    takes the place of the folder's own transformer. Both are relative to the models folder. A row without a folder is
    built in code.
    """

    id: str
    title: str
    licence: str
    text_tokens: int
    folder: str | None = None
    transformer: str | None = None
    embedded: bool = False
    preview: PreviewMap | None = FLUX  # None: its VAE has no map yet, so there are no previews


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint whose files are all there. Paths are None for a row that is built in code."""

    checkpoint: Checkpoint
    folder: Path | None
    transformer: Path | None


CHECKPOINTS: Mapping[str, Checkpoint] = {
    row.id: row
    for row in (
        Checkpoint(
            id="flux/srpo",
            title="FLUX.1 [dev] with Tencent's SRPO transformer",
            licence="FLUX.1 [dev] Non-Commercial License; SRPO: academic use only",
            text_tokens=512,
            folder="FLUX.1-dev",
            transformer="SRPO/diffusion_pytorch_model.safetensors",
        ),
        Checkpoint(
            id="tiny",
            title="a random FLUX of two layers: it draws noise, and is there to show that the server works",
            licence="Apache-2.0",
            text_tokens=64,
            embedded=True,
        ),
    )
}
EMBEDDED = next(row for row in CHECKPOINTS.values() if row.embedded)
SERVED_AS = "flux/srpo"  # the id that clients of the hosted API send


def choose(model: str, models_dir: Path) -> Checkpoint:
    """The row to serve. `auto` is SRPO where any of its files are there, else the embedded model."""
    if model != "auto":
        return CHECKPOINTS[model]
    row = CHECKPOINTS[SERVED_AS]
    return row if any((models_dir / part).exists() for part in (row.folder, row.transformer) if part) else EMBEDDED


def locate(row: Checkpoint, models_dir: Path) -> Located:
    """Find every file of a row. Raises `MissingFiles`, which names what is missing and where it belongs."""
    if row.folder is None:
        return Located(row, None, None)
    folder = models_dir / row.folder
    transformer = models_dir / row.transformer if row.transformer else None
    wanted = [folder / "model_index.json", folder / "transformer" / "config.json"]
    wanted += [folder / name for name in COMPONENTS]
    wanted += [transformer] if transformer else []
    missing = [path for path in wanted if not path.exists()]
    if missing:
        raise MissingFiles(row.id, missing)
    return Located(row, folder, transformer)
