"""The flux/srpo row on a models folder with the real names and layout, written at the tiny model's size."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.traps import Trap

from weights import tiny
from weights.checkpoints import CHECKPOINTS, choose_checkpoint, locate_files
from weights.errors import MissingFiles, WrongWeights
from weights.load import load_pipeline

ROW = CHECKPOINTS["flux/srpo"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev's folder, and an SRPO file whose tensors differ from the folder's own transformer."""
    folder = tmp_path_factory.mktemp("models")
    pipeline = tiny.build()
    pipeline.save_pretrained(folder / "FLUX.1-dev")
    torch.manual_seed(1)
    tensors = {name: torch.randn_like(tensor) for name, tensor in pipeline.transformer.state_dict().items()}
    (folder / "SRPO").mkdir()
    save_file(tensors, folder / "SRPO" / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    """A models folder of one's own to break."""
    target = tmp_path / "models"
    for path in models.rglob("*"):
        if path.is_file():
            (target / path.relative_to(models)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(models)).hardlink_to(path)
    return target


def test_auto_serves_srpo_only_where_its_files_are(models: Path, tmp_path: Path) -> None:
    assert choose_checkpoint("auto", models).id == "flux/srpo"
    assert choose_checkpoint("auto", tmp_path).embedded
    assert choose_checkpoint("tiny", models).id == "tiny"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_srpo_file_takes_the_place_of_the_folders_transformer(models: Path, dtype: torch.dtype) -> None:
    stages: list[str] = []
    pipeline = load_pipeline(locate_files(ROW, models), dtype, CPU, lambda stage, _: stages.append(stage))
    published = load_file(models / "SRPO" / "diffusion_pytorch_model.safetensors")
    loaded = pipeline.transformer.state_dict()
    assert loaded.keys() == published.keys()
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in published.items())
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert part.dtype == dtype
        assert not part.training
    assert "loading the transformer" in stages


@pytest.mark.parametrize("part", ["FLUX.1-dev/vae", "FLUX.1-dev/tokenizer_2", "FLUX.1-dev/model_index.json", "SRPO"])
def test_an_incomplete_folder_names_what_is_missing(copy: Path, part: str) -> None:
    path = copy / part
    path.rename(copy / "elsewhere")
    with pytest.raises(MissingFiles, match=Path(part).name):
        locate_files(ROW, copy)


def broken(copy: Path) -> Path:
    file = copy / "SRPO" / "diffusion_pytorch_model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)  # not the hard link
    return file


def load(models: Path) -> None:
    load_pipeline(locate_files(ROW, models), torch.float32, CPU, lambda *_: None)


def test_a_truncated_file_is_named(copy: Path) -> None:
    file = broken(copy)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WrongWeights, match=file.name):
        load(copy)


def test_missing_surplus_and_misshapen_tensors_are_named(copy: Path) -> None:
    file = broken(copy)
    tensors = load_file(file)
    name = "x_embedder.weight"
    save_file({key: value for key, value in tensors.items() if key != name} | {"extra": torch.ones(1)}, file)
    with pytest.raises(WrongWeights, match=r"1 tensors are missing \(first: x_embedder.weight\).*first: extra"):
        load(copy)
    save_file(tensors | {name: torch.ones(3, 5)}, file)
    with pytest.raises(WrongWeights, match=r"x_embedder.weight has shape \[3, 5\], expected"):
        load(copy)


def test_a_booby_trapped_pickle_beside_good_files_never_runs(copy: Path) -> None:
    mark = copy / "sprung"
    parts = [part for part in (copy / "FLUX.1-dev").iterdir() if part.is_dir()]
    for folder in (*parts, copy / "SRPO"):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", "training_args.bin"):
            torch.save(Trap(mark), folder / name)
    load(copy)
    assert not mark.exists()


def test_tiny_is_the_same_on_every_build_and_has_every_component() -> None:
    first, second = tiny.build(), tiny.build()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        weights = getattr(first, part).state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in getattr(second, part).state_dict().items())
    assert len(first.tokenizer("a café").input_ids) == len("a café".encode()) + 2
