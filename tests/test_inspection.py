"""What `srpo weights inspect` says of files in every format, and what it refuses."""

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from support.traps import Trap
from support.written_formats import TINY, WRITTEN, Tensors, sparse_file

from server.__main__ import main as srpo
from weights import tiny
from weights.checkpoints import CHECKPOINTS, Checkpoint
from weights.errors import UnsafeFile, WrongWeights
from weights.formats.architecture import (
    ARCHITECTURES,
    SWAPPED_HALVES,
    Architecture,
    TransformerConfig,
    original_to_diffusers,
    tensor_shapes,
)
from weights.formats.headers import read_header
from weights.formats.inspection import inspect
from weights.formats.snapshot import check_snapshot

DEV = TransformerConfig()
ORIGINAL_SHAPES = {
    name: (sum(tensor_shapes(DEV)[part][0] for part in stack), *tensor_shapes(DEV)[stack[0]][1:])
    for name, stack in original_to_diffusers(DEV).items()
}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(4)
    return {name: torch.randn(shape) for name, shape in tensor_shapes(TINY).items()}


@pytest.mark.parametrize("known", ARCHITECTURES, ids=lambda known: known.title)
def test_the_tables_shapes_are_those_of_diffusers_class(known: Architecture) -> None:
    config = known.config
    overrides = tiny.TRANSFORMER if known.title == "tiny" else {"guidance_embeds": config.guidance_embeds}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**overrides)
    assert tensor_shapes(config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert TransformerConfig.from_config(model.config) == config


def test_flux_dev_has_1160_tensors_780_in_the_original_keys_and_11_90_billion_parameters() -> None:
    assert len(tensor_shapes(DEV)) == 1160
    assert len(original_to_diffusers(DEV)) == 780
    for table in (tensor_shapes(DEV), ORIGINAL_SHAPES):
        assert sum(torch.Size(shape).numel() for shape in table.values()) == 11_901_408_320
    assert sorted(part for stack in original_to_diffusers(DEV).values() for part in stack) == sorted(tensor_shapes(DEV))


def test_the_table_of_original_keys_says_what_diffusers_converter_does() -> None:
    """The converter is given the number of each row in the place of the row."""
    numbers, first, rows = {}, 0, {}
    for name in original_to_diffusers(DEV):
        rows[name] = torch.arange(first, first := first + ORIGINAL_SHAPES[name][0])
        numbers[name] = rows[name].clone()
    converted = convert_flux_transformer_checkpoint_to_diffusers(numbers)
    assert not numbers, "the converter has taken every tensor"
    assert len(converted) == 1160
    for name, stack in original_to_diffusers(DEV).items():
        found = torch.cat([converted[part] for part in stack])
        if name.startswith(SWAPPED_HALVES):
            found = torch.cat(found.chunk(2)[::-1])
        assert torch.equal(found, rows[name]), name


@pytest.mark.parametrize("case", WRITTEN)
def test_every_format_is_known_by_its_content(tensors: Tensors, tmp_path: Path, case: str) -> None:
    key, write, _ = WRITTEN[case]
    write(tensors, tmp_path / "no-suffix")
    found = inspect(tmp_path / "no-suffix")
    assert (found.format, found.architecture, found.models) == (key, "tiny", ("tiny",))
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (found.missing, found.unexpected, found.problem) == ((), (), None)
    assert found.beside == (2 if case == "comfyui" else 0)


def test_the_models_named_are_those_of_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ARCHITECTURES:
        sparse_file(tmp_path / known.title, tensor_shapes(known.config), "BF16", 2)
    found = {known.name: inspect(tmp_path / known.title).models for known in ARCHITECTURES}
    assert found == {"flux-dev": ("flux/srpo", "flux/dev"), "flux-schnell": ("flux/schnell",), "tiny": ("tiny",)}
    monkeypatch.setitem(cast(dict[str, Checkpoint], CHECKPOINTS), "new", replace(CHECKPOINTS["flux/schnell"], id="new"))
    assert inspect(tmp_path / "FLUX.1 [schnell]").models == ("flux/schnell", "new")


def test_a_lora_is_known(tmp_path: Path) -> None:
    save_file({"lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.ones(2, 2)}, tmp_path / "l")
    found = inspect(tmp_path / "l")
    assert (found.format, found.models, found.problem) == ("lora", (), None)


def test_missing_and_unexpected_tensors_are_listed_and_none_is_served(tensors: Tensors, tmp_path: Path) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("proj_out")}
    save_file(kept | {"more.weight": torch.ones(1)}, tmp_path / "a")
    found = inspect(tmp_path / "a")
    assert (found.missing, found.unexpected, found.models) == (
        ("proj_out.bias", "proj_out.weight"),
        ("more.weight",),
        (),
    )
    save_file(tensors | {"proj_out.bias": torch.ones(3)}, tmp_path / "b")
    assert inspect(tmp_path / "b").problem == "proj_out.bias has shape [3], expected [64]"
    save_file(tensors | {"proj_out.bias": torch.ones(64, dtype=torch.int32)}, tmp_path / "c")
    assert "proj_out.bias holds I32" in str(inspect(tmp_path / "c").problem)


def test_the_command_reads_headers_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of 24 and 48 GB that are nothing but holes."""
    sparse_file(tmp_path / "srpo", tensor_shapes(DEV), "F32", 4)
    prefixed = {f"model.diffusion_model.{name}": shape for name, shape in ORIGINAL_SHAPES.items()}
    sparse_file(tmp_path / "comfy", prefixed, "BF16", 2)
    sparse_file(tmp_path / "schnell", tensor_shapes(TransformerConfig(guidance_embeds=False)), "BF16", 2)
    said = {}
    for name in ("srpo", "comfy", "schnell"):
        assert srpo(["weights", "inspect", str(tmp_path / name), "--json"]) == 0
        said[name] = json.loads(capsys.readouterr().out)
    assert said["srpo"]["parameters"] == said["comfy"]["parameters"] == 11_901_408_320
    assert [said[name]["format"] for name in said] == ["diffusers", "comfyui", "diffusers"]
    assert said["srpo"]["models"] == ["flux/srpo", "flux/dev"]
    assert said["schnell"]["models"] == ["flux/schnell"]
    assert srpo(["weights", "inspect", str(tmp_path / "srpo")]) == 0
    text = " ".join(capsys.readouterr().out.split())  # a long path breaks its line
    assert "47.61 GB, 1160 tensors" in text
    assert "11.90 billion (11,901,408,320)" in text


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("form", ["torch.save", "torch.save, old", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
def test_a_booby_trapped_pickle_is_refused_whatever_its_name(tmp_path: Path, name: str, form: str | int) -> None:
    mark, file = tmp_path / "sprung", tmp_path / name
    if isinstance(form, int):
        file.write_bytes(pickle.dumps(Trap(mark), protocol=form))
    else:
        torch.save(Trap(mark), file, _use_new_zipfile_serialization="old" not in form)
    with pytest.raises(UnsafeFile, match=r"model.*pickle file \(torch.save\)"):
        inspect(file)
    assert not mark.exists()


@pytest.mark.parametrize("length", [640, 0x0580, 0x043C, 0x3C20, 1000])
def test_the_length_of_a_header_is_no_sign_of_another_kind_of_file(tmp_path: Path, length: int) -> None:
    """640 is 80 02 in the file, as a pickle begins; 0x3c20 is " <", as a page may; the name has the word of a tar."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    entries = {"__metadata__": {"from": f"{' ' * 222}ustar"}, "weight": entry}
    header = json.dumps(entries).ljust(length).encode()
    data = length.to_bytes(8, "little") + header + bytes(4)
    assert data[257:262] == b"ustar"
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    assert list(read_header(file).tensors) == ["weight"]
    file.write_bytes(data[:-1])
    with pytest.raises(WrongWeights, match="cut off"):
        read_header(file)


def test_other_files_are_refused_with_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "weights.ckpt": (b"\x08\0\0\0\0\0\0\0{}      ", "never read"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS pointer"),
        "page": (b"<!DOCTYPE html><html></html>", "web page"),
        "noise": (bytes(range(200)), "neither a safetensors nor a GGUF file"),
        "empty": (b"", "neither"),
        "header": ((9).to_bytes(8, "little") + b'{"a": 1}}', "header is damaged"),
        "text": (b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16, "GGUF header is damaged"),
    }
    for name, (data, said) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert srpo(["weights", "inspect", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert name in error
        assert error.count("\n") == 1
    assert srpo(["weights", "inspect", str(tmp_path / "absent")]) == 2
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["diffusers", "sharded folder", "gguf Q8_0"])
def test_a_truncated_file_is_named_with_expected_and_found_size(tensors: Tensors, tmp_path: Path, case: str) -> None:
    WRITTEN[case][1](tensors, tmp_path / "model")
    file = tmp_path / "model"
    if file.is_dir():
        file = file / "diffusion_pytorch_model-00002-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    sizes = rf"{file.name}: cut off: expected {len(data):,} bytes, got {len(data) - 1000:,}"
    with pytest.raises(WrongWeights, match=sizes):
        inspect(tmp_path / "model")


def test_a_missing_shard_is_named(tensors: Tensors, tmp_path: Path) -> None:
    WRITTEN["sharded folder"][1](tensors, tmp_path / "model")
    (tmp_path / "model" / "diffusion_pytorch_model-00003-of-00003.safetensors").unlink()
    with pytest.raises(WrongWeights, match=r"00003-of-00003\.safetensors: missing"):
        inspect(tmp_path / "model")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    tiny.build().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_whole_pipelines_folder_is_inspected(pipeline: Path) -> None:
    assert inspect(pipeline).models == ("tiny",)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("vae/config.json", None, "component vae is missing or incomplete"),
        ("tokenizer_2/tokenizer_config.json", None, "component tokenizer_2 is missing or incomplete"),
        ("vae/diffusion_pytorch_model.safetensors", None, "holds no safetensors file"),
        ("model_index.json", {"vae": ["pipeline_evil", "Vae"]}, "vae asks for code from 'pipeline_evil'"),
        ("model_index.json", {"_class_name": ["evil", "Pipeline"]}, "a pipeline class of its own"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "expected a FluxPipeline"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "component text_encoder_2 is missing"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.*custom code"),
    ],
)
def test_a_snapshot_with_something_missing_or_with_code_is_refused(
    pipeline: Path, part: str, change: dict[str, object] | None, said: str
) -> None:
    if change is None:
        (pipeline / part).unlink()
    else:
        (pipeline / part).write_text(json.dumps(json.loads((pipeline / part).read_text()) | change))
    with pytest.raises((WrongWeights, UnsafeFile), match=said):
        check_snapshot(pipeline)


def test_a_component_that_holds_only_pickle_is_refused_and_the_pickle_named(pipeline: Path) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with zipfile.ZipFile(pipeline / "vae" / "diffusion_pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"")
    with pytest.raises(UnsafeFile, match=r"diffusion_pytorch_model\.bin is refused: a pickle file"):
        check_snapshot(pipeline)
