"""The checkpoints this server can serve: one row a model.

A row knows where its files lie under the models folder, from which repositories they come, what the model was made
for (text tokens, bounds, defaults), and under which licences it comes. Locating reads names only; `weights.load`
reads the files, `weights.hub.pull` fetches them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from weights import sketch
from weights.errors import MissingFiles
from weights.latent_rgb import FLUX, PreviewMap

COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence, where its text stands, and what it asks in plain words."""

    name: str
    url: str
    asks: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository on the hub, at one revision, and which of its files serving needs.

    `files` are shell patterns on the repository's paths; each must match something (the licence's own text comes along
    where there is one). `folder` is where the files go, under the models folder. `revision` is a commit, or `main`
    where none could be pinned; what was fetched is in the manifest either way. `sha256` of a file, where it is known
    from elsewhere, holds whatever the hub says.
    """

    name: str
    revision: str
    folder: str
    files: tuple[str, ...]
    licence: Licence
    gated: bool = False
    sha256: tuple[tuple[str, str], ...] = ()  # file, digest


class ParameterCounts(NamedTuple):
    """Parameters of a model's parts. Of the transformer's, `blocks` are those of `architecture.BLOCK_LINEARS`."""

    blocks: int = 0
    rest: int = 0
    texts: int = 0
    vae: int = 0


SMALL = ParameterCounts()  # too few parameters to matter


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model.

    `folder` holds the pipeline in diffusers layout; `transformer`, where set, is the single safetensors file that
    takes the place of the folder's own transformer. Both are relative to the models folder, but for an embedded row's
    folder, which comes with this package. A row without a folder is built in code. `bounds` (lowest and highest) and
    `defaults` are the model's own, by the names of `pipelines.request.GenerationParams`, where they differ from
    flux/srpo's; `remarks` are added to their help. `sample_prompt` is one that the model draws well. `guidance` is the
    range of scales and `canvas` the one size (width, height) that the model has learned, None where it takes all that
    the API allows.
    """

    id: str
    title: str
    licence: str
    text_tokens: int
    sizes: ParameterCounts = SMALL
    folder: str | None = None
    transformer: str | None = None
    embedded: bool = False
    sample_prompt: str = "A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses."
    guidance: tuple[float, float] | None = None
    canvas: tuple[int, int] | None = None
    knows: tuple[str, ...] = ()  # the things it can draw, where they are that few
    preview: PreviewMap | None = FLUX  # None: its VAE has no map yet, so there are no previews
    repositories: tuple[Repository, ...] = ()
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint whose files are all there. Paths are None for a row that is built in code."""

    checkpoint: Checkpoint
    folder: Path | None
    transformer: Path | None


FLUX_DEV_LICENCE = Licence(
    "FLUX.1 [dev] Non-Commercial License v1.1.1",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    "No commercial use of the model, and no service for end users. Section 2(e): you run filters against unlawful and "
    "infringing content, or review every picture before it is given on. Say that pictures are made by AI where law "
    "asks for it.",
)
SRPO_LICENCE = Licence(
    "SRPO License (Tencent)",
    "https://huggingface.co/tencent/SRPO",
    "Academic use only: no commercial use and no production use. FLUX.1 [dev]'s licence holds on top of it.",
)
APACHE = Licence(
    "Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", "Commercial use is allowed; keep the licence text."
)
WITHOUT_TRANSFORMER = (  # of a FLUX.1 repository: not its transformer, not the single-file twins of it and of the VAE
    "model_index.json",
    "scheduler/*.json",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "text_encoder_2/*.json",
    "text_encoder_2/*.safetensors",
    "tokenizer/*",
    "tokenizer_2/*",
    "transformer/config.json",
    "vae/*.json",
    "vae/*.safetensors",
)
WHOLE_PIPELINE = (*WITHOUT_TRANSFORMER, "transformer/*.json", "transformer/*.safetensors")
FLUX_SIZES = ParameterCounts(8_606_711_808, 3_294_696_512, 4_885_371_136, 83_819_683)  # FLUX.1 [dev]; texts: T5, CLIP
FLUX_DEV = ("black-forest-labs/FLUX.1-dev", "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21", "FLUX.1-dev")
FLUX_SCHNELL = ("black-forest-labs/FLUX.1-schnell", "741f7c3ce8b383c54771c7003378a50191e9efe9", "FLUX.1-schnell")
SRPO = Repository("tencent/SRPO", "main", "SRPO", ("diffusion_pytorch_model.safetensors",), SRPO_LICENCE)
SAFETY = Repository(
    "Falconsai/nsfw_image_detection",
    "96cb0d0342c7afb80cab76ecc58b265fa44da256",
    "safety",
    ("config.json", "preprocessor_config.json", "model.safetensors"),
    APACHE,
)
COMPVIS = Repository(
    "CompVis/stable-diffusion-safety-checker",
    "refs/pr/41",  # the one with safetensors: `main` may have pickle only
    "safety-compvis",
    ("config.json", "preprocessor_config.json", "model.safetensors"),
    Licence(
        "CreativeML Open RAIL-M, as Stable Diffusion",
        "https://huggingface.co/CompVis/stable-diffusion-safety-checker",
        "Commercial use is allowed; the licence lists uses that are not. It came with Stable Diffusion: see its page.",
    ),
    sha256=(("model.safetensors", "08902f19b1cfebd7c989f152fc0507bef6898c706a91d666509383122324b511"),),
)

CHECKPOINTS: Mapping[str, Checkpoint] = {
    row.id: row
    for row in (
        Checkpoint(
            id="flux/srpo",
            title="FLUX.1 [dev] with Tencent's SRPO transformer",
            licence="FLUX.1 [dev] Non-Commercial License; SRPO: academic use only",
            text_tokens=512,
            sizes=FLUX_SIZES,
            folder="FLUX.1-dev",
            transformer="SRPO/diffusion_pytorch_model.safetensors",
            repositories=(Repository(*FLUX_DEV, WITHOUT_TRANSFORMER, FLUX_DEV_LICENCE, gated=True), SRPO),
        ),
        Checkpoint(
            id="flux/dev",
            title="FLUX.1 [dev] as Black Forest Labs publishes it",
            licence="FLUX.1 [dev] Non-Commercial License",
            text_tokens=512,
            sizes=FLUX_SIZES,
            folder="FLUX.1-dev",
            repositories=(Repository(*FLUX_DEV, WHOLE_PIPELINE, FLUX_DEV_LICENCE, gated=True),),
            defaults={"guidance_scale": 3.5},
        ),
        Checkpoint(
            id="flux/schnell",
            title="FLUX.1 [schnell]: distilled to a few steps, for commercial use too",
            licence="Apache-2.0",
            text_tokens=256,
            sizes=FLUX_SIZES,
            folder="FLUX.1-schnell",
            repositories=(Repository(*FLUX_SCHNELL, WHOLE_PIPELINE, APACHE, gated=True),),
            bounds={"num_inference_steps": (1, 12)},
            defaults={"num_inference_steps": 4, "guidance_scale": 3.5},
            remarks={"guidance_scale": "This model has no guidance: any value draws the same picture."},
        ),
        Checkpoint(
            id="flux/sketch",
            title="a small FLUX of our own: it draws simple pictures of a hundred things",
            licence="Apache-2.0",
            text_tokens=sketch.MANIFEST["text_tokens"],
            folder=str(sketch.FOLDER),
            embedded=True,
            sample_prompt="a green apple on a blue background",
            guidance=tuple(sketch.MANIFEST["guidance"]),
            canvas=tuple(sketch.MANIFEST["canvas"]),
            knows=tuple(sketch.MANIFEST["knows"]["things"]),
            preview=PreviewMap(**sketch.MANIFEST["preview"]),
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
EMBEDDED = CHECKPOINTS["flux/sketch"]
SERVED_AS = "flux/srpo"  # the id that clients of the hosted API send


def choose(model: str, models_dir: Path) -> Checkpoint:
    """The row to serve. `auto` is SRPO where any of its files are there, else the embedded model."""
    if model != "auto":
        return CHECKPOINTS[model]
    row = CHECKPOINTS[SERVED_AS]
    return row if any((models_dir / part).exists() for part in (row.folder, row.transformer) if part) else EMBEDDED


def locate(row: Checkpoint, models_dir: Path, given: Path | None = None) -> CheckpointFiles:
    """Find every file of a row. Raises `MissingFiles`, which names what is missing and where it belongs.

    `given` is a transformer in the place of the row's own, which then need not be there.
    """
    if row.folder is None:
        return CheckpointFiles(row, None, given)
    folder = models_dir / row.folder
    transformer = given or (models_dir / row.transformer if row.transformer else None)
    wanted = [folder / "model_index.json", folder / "transformer" / "config.json"]
    wanted += [folder / name for name in COMPONENTS]
    wanted += [transformer] if transformer else []
    missing = [path for path in wanted if not path.exists()]
    if transformer is None and not any((folder / "transformer").glob("*.safetensors")):
        missing.append(folder / "transformer" / "diffusion_pytorch_model*.safetensors")
    if missing:
        raise MissingFiles(row.id, missing)
    return CheckpointFiles(row, folder, transformer)


def downloads() -> Mapping[str, tuple[Repository, ...]]:
    """What can be pulled, by name: the published models, and two fuller safety checkers."""
    models = {row.id: row.repositories for row in CHECKPOINTS.values() if row.repositories}
    return models | {"safety": (SAFETY,), "safety-compvis": (COMPVIS,)}
