"""`srpo serve --transformer FILE` as a process, over the folder that a pull brings: FLUX.1-dev without weights."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from support.server import START_LIMIT, LiveServer
from support.written_formats import TINY, WRITTEN, Tensors

from server.cli import doctor
from weights import tiny
from weights.formats.architecture import tensor_shapes


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    torch.manual_seed(11)
    return {name: torch.randn(shape) * 0.1 for name, shape in tensor_shapes(TINY).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.build().save_pretrained(folder / "FLUX.1-dev")
    for file in (folder / "FLUX.1-dev" / "transformer").glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def serve_file(
    serve: Callable[..., LiveServer], models: Path, tmp_path: Path, tensors: Tensors
) -> Callable[..., LiveServer]:
    """A server of a file in the format of a row of `WRITTEN`, changed by `spoil`."""

    def run(case: str, spoil: Callable[[Path], object] = lambda _: None, wait: bool = True) -> LiveServer:
        file = tmp_path / f"{case} file"  # no suffix: the content tells
        WRITTEN[case][1](tensors, file)
        spoil(file)
        return serve(
            "--transformer", str(file), wait=wait, model="auto", devices="cpu", models_dir=str(models), batch_sizes=""
        )

    return run


@pytest.mark.long
def test_the_formats_people_have_are_served(serve_file: Callable[..., LiveServer]) -> None:
    pictures = {}
    for case in ("comfyui", "gguf Q8_0"):  # test_formats.py draws with every one
        server = serve_file(case)
        assert httpx.get(f"{server.url}/health").json()["served_model"] == "flux/srpo"
        reply = server.generate(output_format="png", acceleration="none", seed=3)
        assert reply.status_code == 201, reply.text
        assert "x-served-model" not in reply.headers
        pictures[case] = httpx.get(reply.json()["images"][0]["url"]).content
        server.process.terminate()
    assert pictures["comfyui"] != pictures["gguf Q8_0"]  # which is rounded


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "spoil", "said"),
    [
        ("comfyui", lambda file: file.write_bytes(file.read_bytes()[:-9]), "comfyui file: cut off: expected"),
        ("diffusers", lambda file: torch.save({"proj_out.bias": torch.ones(64)}, file), "is refused: a pickle file"),
    ],
)
def test_a_file_that_cannot_be_served_ends_the_server_with_the_reason(
    serve_file: Callable[..., LiveServer], case: str, spoil: Callable[[Path], object], said: str
) -> None:
    server = serve_file(case, spoil, wait=False)
    assert server.process.wait(START_LIMIT) == 78
    assert said in server.shown()


def test_the_doctor_looks_at_the_file_that_would_be_served(
    models: Path, tmp_path: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITTEN["gguf Q8_0"][1](tensors, tmp_path / "file")
    flags = ["--json", "--models-dir", str(models), "--data-dir", str(tmp_path), "--port", "0", "--devices", "cpu"]
    file = ["--transformer", str(tmp_path / "file")]

    def weights(*arguments: str) -> tuple[int, str]:
        code = doctor.main([*flags, *arguments])
        return code, json.loads(capsys.readouterr().out)["checks"]["weights"]["text"]

    code, said = weights(*file)
    assert (code, "flux/srpo is there" in said) == (0, True)
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-9])
    code, said = weights(*file)
    assert (code, "file: cut off: expected" in said) == (1, True)
    code, said = weights()
    assert (code, "flux/srpo is not complete" in said) == (1, True)
