"""The checkpoints that this server can serve: one row of `CHECKPOINTS` for each model.

A row says where the files lie below the models folder, which repositories and licences they come with, and what the
model was trained for (text tokens, bounds, defaults). This module only looks for files: `weights.load` reads them, and
`weights.hub.pull` fetches them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from weights import sketch
from weights.errors import MissingFiles
from weights.latent_rgb import FLUX_LATENT_RGB, LatentRGB

ArchitectureName = Literal["flux-dev", "flux-schnell", "tiny"]  # of `weights.formats.architecture.ARCHITECTURES`
COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence: its name, where its text is, and its conditions in plain words."""

    name: str
    url: str
    conditions: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository on the hub, at one revision, and the files of it that serving needs.

    `files` are shell patterns for paths in the repository; each must match at least one file. The licence's text is
    fetched too, where there is one. `folder`, below the models folder, is where the files go. `revision` is a commit,
    or `main` where no commit is known; the manifest records the commit in either case. `sha256` holds digests that were
    published elsewhere: a file must have that digest even if the hub says otherwise.
    """

    name: str
    revision: str
    folder: str
    files: tuple[str, ...]
    licence: Licence
    gated: bool = False
    sha256: tuple[tuple[str, str], ...] = ()  # file, digest


class ParameterCounts(NamedTuple):
    """How many parameters each part of a model has. `blocks` counts those of `architecture.BLOCK_LINEARS`."""

    blocks: int = 0
    rest: int = 0
    texts: int = 0
    vae: int = 0


NEGLIGIBLE = ParameterCounts()  # too few parameters to matter


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model.

    `folder` holds the pipeline in diffusers layout. `transformer`, if set, is a single safetensors file that is used
    instead of the folder's own transformer. Both are relative to the models folder; the folder of an embedded model is
    part of this package. A model without a folder is built in code. A file of another origin can take the transformer's
    place if it has the `architecture`; None: that of the folder's `config.json`, which no other model has.

    `bounds` (lowest, highest) and `defaults` replace those of flux/srpo, by the names in
    `pipelines.request.GenerationParams`; `remarks` are added to the help of these parameters. `guidance` is the range
    of scales and `canvas` the size (width, height) around which the model has learned pictures; None: all that the API
    allows.
    `sample_prompt` is one that the model draws well.
    """

    id: str
    title: str
    licence: str
    text_tokens: int
    architecture: ArchitectureName | None
    sizes: ParameterCounts = NEGLIGIBLE
    pinned: ParameterCounts = NEGLIGIBLE  # `sizes` with tensors rounded up to powers of two, as pinned memory may be
    folder: str | None = None
    transformer: str | None = None
    embedded: bool = False
    sample_prompt: str = "A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses."
    guidance: tuple[float, float] | None = None
    canvas: tuple[int, int] | None = None
    words: frozenset[str] | None = None  # in lower case, the only words it knows; None: a whole language
    subjects: tuple[str, ...] = ()  # what it can draw, for a model that knows only a few things
    ideas: tuple[str, ...] = ()  # prompts that show what such a model can do
    preview: LatentRGB | None = FLUX_LATENT_RGB  # None: no previews, since nobody has fitted a map for its VAE
    repositories: tuple[Repository, ...] = ()
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files of a checkpoint, all present. The paths are None for a model that is built in code."""

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
WITHOUT_TRANSFORMER = (  # a FLUX.1 repository without its transformer and without the single-file copies
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
FLUX_PINNED = ParameterCounts(14_663_286_784, 3_937_258_560, 6_795_202_560, 147_071_396)
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
            architecture="flux-dev",
            sizes=FLUX_SIZES,
            pinned=FLUX_PINNED,
            folder="FLUX.1-dev",
            transformer="SRPO/diffusion_pytorch_model.safetensors",
            repositories=(Repository(*FLUX_DEV, WITHOUT_TRANSFORMER, FLUX_DEV_LICENCE, gated=True), SRPO),
        ),
        Checkpoint(
            id="flux/dev",
            title="FLUX.1 [dev] as Black Forest Labs publishes it",
            licence="FLUX.1 [dev] Non-Commercial License",
            text_tokens=512,
            architecture="flux-dev",
            sizes=FLUX_SIZES,
            pinned=FLUX_PINNED,
            folder="FLUX.1-dev",
            repositories=(Repository(*FLUX_DEV, WHOLE_PIPELINE, FLUX_DEV_LICENCE, gated=True),),
            defaults={"guidance_scale": 3.5},
        ),
        Checkpoint(
            id="flux/schnell",
            title="FLUX.1 [schnell]: distilled to a few steps, for commercial use too",
            licence="Apache-2.0",
            text_tokens=256,
            architecture="flux-schnell",
            sizes=FLUX_SIZES,
            pinned=FLUX_PINNED,
            folder="FLUX.1-schnell",
            repositories=(Repository(*FLUX_SCHNELL, WHOLE_PIPELINE, APACHE, gated=True),),
            bounds={"num_inference_steps": (1, 12)},
            defaults={"num_inference_steps": 4, "guidance_scale": 3.5},
            remarks={"guidance_scale": "This model has no guidance: any value draws the same picture."},
        ),
        Checkpoint(
            id="flux/sketch",
            title=f"a small FLUX of our own: simple pictures of {len(sketch.MANIFEST['knows']['things'])} things",
            licence="Apache-2.0",
            text_tokens=sketch.MANIFEST["text_tokens"],
            architecture=None,
            folder=str(sketch.FOLDER),
            embedded=True,
            sample_prompt="a green apple on a blue background",
            guidance=tuple(sketch.MANIFEST["guidance"]),
            canvas=tuple(sketch.MANIFEST["canvas"]),
            words=frozenset(sketch.MANIFEST["knows"]["words"].split()),
            subjects=tuple(sketch.MANIFEST["knows"]["things"]),
            ideas=tuple(sketch.MANIFEST["ideas"]),
            preview=LatentRGB(**sketch.MANIFEST["preview"]),
        ),
        Checkpoint(
            id="tiny",
            title="a random FLUX of two layers: it draws noise, and is there to show that the server works",
            licence="Apache-2.0",
            text_tokens=64,
            architecture="tiny",
            embedded=True,
        ),
    )
}
EMBEDDED = CHECKPOINTS["flux/sketch"]
HOSTED_MODEL = "flux/srpo"  # the model id that clients of the hosted API send


def choose_checkpoint(model: str, models_dir: Path) -> Checkpoint:
    """The checkpoint to serve. `auto`: SRPO if any of its files is present, else the embedded model."""
    if model != "auto":
        return CHECKPOINTS[model]
    hosted = CHECKPOINTS[HOSTED_MODEL]
    has_files = any((models_dir / part).exists() for part in (hosted.folder, hosted.transformer) if part)
    return hosted if has_files else EMBEDDED


def locate_files(checkpoint: Checkpoint, models_dir: Path, replacement: Path | None = None) -> CheckpointFiles:
    """Find every file of a checkpoint. Raises `MissingFiles`, which lists the missing files.

    `replacement` is a transformer to use instead of the checkpoint's own, which then may be missing.
    """
    if checkpoint.folder is None:
        return CheckpointFiles(checkpoint, None, replacement)
    folder = models_dir / checkpoint.folder
    transformer = replacement or (models_dir / checkpoint.transformer if checkpoint.transformer else None)
    required = [folder / "model_index.json", folder / "transformer" / "config.json"]
    required += [folder / name for name in COMPONENTS]
    required += [transformer] if transformer else []
    missing = [path for path in required if not path.exists()]
    if transformer is None and not any((folder / "transformer").glob("*.safetensors")):
        missing.append(folder / "transformer" / "diffusion_pytorch_model*.safetensors")
    if missing:
        raise MissingFiles(checkpoint.id, missing)
    return CheckpointFiles(checkpoint, folder, transformer)


def list_downloads() -> Mapping[str, tuple[Repository, ...]]:
    """What can be pulled, by name: the published models and two safety checkers."""
    models = {row.id: row.repositories for row in CHECKPOINTS.values() if row.repositories}
    return models | {"safety": (SAFETY,), "safety-compvis": (COMPVIS,)}
