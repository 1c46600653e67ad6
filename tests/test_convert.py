"""What `srpo weights convert` writes, and that it leaves nothing behind when it fails."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import engine_with, weights_of
from support.written_formats import TINY, WRITTEN, Tensors, sparse_file

from server.__main__ import main as srpo
from weights.formats.architecture import BLOCK_LINEARS, TransformerConfig, tensor_shapes
from weights.formats.inspection import inspect
from weights.formats.output_formats import OUTPUT_FORMATS


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(8)
    return {name: torch.randn(shape) * 0.1 for name, shape in tensor_shapes(TINY).items()}


@pytest.mark.parametrize("case", ["diffusers", "comfyui", "fp8 scaled", "gguf Q8_0", "sharded folder"])
@pytest.mark.parametrize("to", OUTPUT_FORMATS)
def test_convert(tensors: Tensors, tmp_path: Path, case: str, to: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    WRITTEN[case][1](tensors, source)
    assert srpo(["weights", "convert", str(source), str(target), "--to", to, "--revision", "abc"]) == 0
    assert inspect(target).format == {"bf16": "diffusers", "fp8": "fp8-rows", "q4": "gguf"}[to]
    assert inspect(target).problem is None
    before, after = weights_of(engine_with(source)), weights_of(engine_with(target))
    for name, tensor in before.items():
        allowed = {"bf16": 2**-8, "fp8": 2**-4, "q4": 2**-3}[to] if BLOCK_LINEARS.fullmatch(name) else 2**-8
        assert (after[name] - tensor).abs().max() <= allowed * tensor.abs().max(), name
    if to == "bf16":
        assert all(torch.equal(load_file(target)[name], tensor.bfloat16()) for name, tensor in before.items())
    manifest = json.loads((tmp_path / "target.manifest.json").read_text())
    assert manifest["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    assert manifest["files"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert (manifest["revision"], manifest["dtype"]) == ("abc", to)
    assert manifest["tool"].startswith("srpo-server ")


def test_fp8_rows_each_have_their_scale(tensors: Tensors, tmp_path: Path) -> None:
    """A row a thousand times as large as its neighbours does not cost them their precision."""
    name = "transformer_blocks.0.attn.to_q.weight"
    uneven = tensors | {name: tensors[name] * torch.logspace(-4, 4, 32)[:, None]}
    save_file(uneven, tmp_path / "source")
    assert srpo(["weights", "convert", str(tmp_path / "source"), str(tmp_path / "target"), "--to", "fp8"]) == 0
    read = weights_of(engine_with(tmp_path / "target"))[name]
    assert ((read - uneven[name]).abs().amax(1) <= uneven[name].abs().amax(1) / 16).all()
    stored = load_file(tmp_path / "target")
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored["norm_out.linear.weight"].dtype == torch.bfloat16


@pytest.fixture
def half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading fails in the middle."""
    from weights.formats.read import TensorReader

    read, count = TensorReader.read, iter(range(10**6))

    def failing(self: TensorReader, name: str) -> torch.Tensor:
        if next(count) == 20:
            raise OSError(28, "No space left on device")
        return read(self, name)

    monkeypatch.setattr(TensorReader, "read", failing)


@pytest.mark.usefixtures("half_written")
def test_a_failed_conversion_leaves_nothing(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(tensors, tmp_path / "source")
    assert srpo(["weights", "convert", str(tmp_path / "source"), str(tmp_path / "target")]) == 2
    assert "target cannot be written: No space left on device" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_converted_is_said_before_any_work(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tensors, tmp_path / "source")
    (tmp_path / "there").write_bytes(b"mine")
    assert srpo(["weights", "convert", str(tmp_path / "source"), str(tmp_path / "there")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "there").read_bytes() == b"mine"
    assert srpo(["weights", "convert", str(tmp_path / "source"), str(tmp_path / "nowhere" / "file")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1000))
    assert srpo(["weights", "convert", str(tmp_path / "source"), str(tmp_path / "target")]) == 2
    assert "only 1,000 are free" in capsys.readouterr().err
    (tmp_path / "short").write_bytes((tmp_path / "source").read_bytes()[:-4])
    assert srpo(["weights", "convert", str(tmp_path / "short"), str(tmp_path / "target")]) == 2
    assert "short: cut off: expected" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


@pytest.mark.long
def test_memory_is_bounded_by_the_largest_tensor_not_by_the_file(tmp_path: Path) -> None:
    """FLUX.1 [dev]'s own width, one block of each kind: 2.2 GB in float32, all holes."""
    source = tmp_path / "transformer"
    source.mkdir()
    config = TransformerConfig(num_layers=1, num_single_layers=1)
    (source / "config.json").write_text(json.dumps(asdict(config)))
    sparse_file(source / "diffusion_pytorch_model.safetensors", tensor_shapes(config), "F32", 4)
    command = f"import sys, server.cli.weights.convert as c; sys.exit(c.main(['{source}', '{tmp_path / 'bf16'}']))"
    usage = (
        "import resource, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )
    ended = subprocess.run([sys.executable, "-c", usage, command], capture_output=True, text=True, check=True)
    assert int(ended.stdout.split()[-1]) < 1500  # MiB, of which torch takes 400
    size = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    assert (tmp_path / "bf16").stat().st_size > 2 * size > 1e9
