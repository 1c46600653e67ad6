"""The rows of CHECKPOINTS: each model's own bounds, defaults and files."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from httpx import ASGITransport, AsyncClient

from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.loading.build import describe_engine
from pipelines.request import GenerationParams, for_model
from server.app import create_app
from server.errors import InvalidRequest
from server.schema import read_body
from server.settings.server import Settings
from server.translation.aliases import translate
from server.translation.model_names import Dialect
from weights import tiny
from weights.checkpoints import CHECKPOINTS, Checkpoint, choose_checkpoint, list_downloads, locate_files
from weights.errors import MissingFiles

PUBLISHED = {  # what the hosted APIs of these models say: steps from, to, default; guidance default
    "flux/srpo": (1, 50, 28, 4.5),
    "flux/dev": (1, 50, 28, 3.5),
    "flux/schnell": (1, 12, 4, 3.5),
}
PUBLISHED_FILES = """
.gitattributes LICENSE.md README.md ae.safetensors dev_grid.jpg flux1-dev.safetensors model_index.json
scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.safetensors text_encoder_2/config.json
text_encoder_2/model-00001-of-00002.safetensors text_encoder_2/model-00002-of-00002.safetensors
text_encoder_2/model.safetensors.index.json tokenizer/merges.txt tokenizer/special_tokens_map.json
tokenizer/tokenizer_config.json tokenizer/vocab.json tokenizer_2/special_tokens_map.json tokenizer_2/spiece.model
tokenizer_2/tokenizer.json tokenizer_2/tokenizer_config.json transformer/config.json
transformer/diffusion_pytorch_model-00001-of-00003.safetensors
transformer/diffusion_pytorch_model-00002-of-00003.safetensors
transformer/diffusion_pytorch_model-00003-of-00003.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json vae/config.json vae/diffusion_pytorch_model.safetensors
"""  # of black-forest-labs/FLUX.1-dev


@pytest.mark.parametrize("model", PUBLISHED)
async def test_a_row_narrows_what_is_accepted_documented_and_taken_by_default(model: str, tmp_path: Path) -> None:
    low, high, steps, guidance = PUBLISHED[model]
    body = read_body({"model": model, "prompt": "a"}, model)
    assert (body.num_inference_steps, body.guidance_scale) == (steps, guidance)
    assert read_body({"model": "flux/srpo", "prompt": "a"}, model).num_inference_steps == steps
    for accepted in (low, high):
        assert read_body({"model": model, "prompt": "a", "num_inference_steps": accepted}, model)
    with pytest.raises(InvalidRequest, match=f"an integer from {low} to {high}, received {high + 1}"):
        read_body({"model": model, "prompt": "a", "num_inference_steps": high + 1}, model)
    app = create_app(Settings(model=model, models_dir=tmp_path, data_dir=tmp_path))
    async with AsyncClient(transport=ASGITransport(app), base_url="http://127.0.0.1") as client:
        document = (await client.get("/openapi.json")).json()
    asked = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    asked = asked["schema"]["oneOf"][0]
    said = asked["properties"]["num_inference_steps"]
    assert (said["minimum"], said["maximum"], said["default"]) == (low, high, steps)
    assert asked["properties"]["guidance_scale"]["default"] == guidance
    assert asked["properties"]["model"]["enum"][0] == model


def test_a_foreign_spelling_beyond_the_rows_bounds_is_ignored_and_said() -> None:
    translated = translate({"prompt": "a", "steps": 28, "guidance": 7}, Dialect("flux/schnell"))
    assert translated.native == {"prompt": "a", "guidance_scale": 7}
    assert translated.ignored == ["steps"]


def test_a_row_without_bounds_of_its_own_takes_flux_srpos() -> None:
    for row in CHECKPOINTS.values():
        if not (row.bounds or row.defaults or row.remarks):
            assert for_model(row.id, GenerationParams) is GenerationParams


def test_a_model_without_guidance_draws_the_same_at_any_and_says_so() -> None:
    pipeline = tiny.build(guidance_embeds=False)
    info = describe_engine("tiny", pipeline, torch.device("cpu"), torch.float32)
    engine = FluxEngine(pipeline, EngineOptions(info, tiny.TEXT_TOKENS))

    def draw(guidance: float) -> Any:
        body = {"prompt": "a", "image_size": "square", "num_inference_steps": 1, "seed": 3, "guidance_scale": guidance}
        (sample,) = engine.prepare(GenerationParams.model_validate(body).to_request("tiny"))
        engine.step([sample])
        return engine.finish(sample)

    first, second = draw(1.0), draw(20.0)
    assert first.data == second.data
    assert [note for note in first.notes if note.startswith("guidance_scale")]


@pytest.mark.parametrize(
    ("model", "transformer"), [("flux/srpo", ["transformer/config.json"]), ("flux/dev", "transformer/*")]
)
def test_a_row_takes_of_flux_1_dev_only_what_serving_needs(model: str, transformer: Any) -> None:
    patterns = CHECKPOINTS[model].repositories[0].files
    listing = PUBLISHED_FILES.split()
    taken = [path for path in listing if any(fnmatch(path, pattern) for pattern in patterns)]
    own = [path for path in listing if path.startswith("transformer/")]
    assert [path for path in taken if path.startswith("transformer/")] == (transformer if model == "flux/srpo" else own)
    assert not {"flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg", "README.md"} & set(taken)
    folders = {path.split("/")[0] for path in listing if "/" in path}
    assert {path.split("/")[0] for path in taken} == {"model_index.json", *folders}
    assert all(any(fnmatch(path, pattern) for path in listing) for pattern in patterns)


def test_flux_dev_needs_a_transformer_of_its_own(tmp_path: Path) -> None:
    tiny.build().save_pretrained(tmp_path / "FLUX.1-dev")
    assert locate_files(CHECKPOINTS["flux/dev"], tmp_path).transformer is None
    for file in (tmp_path / "FLUX.1-dev" / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(MissingFiles, match=r"transformer/diffusion_pytorch_model"):
        locate_files(CHECKPOINTS["flux/dev"], tmp_path)
    assert choose_checkpoint("auto", tmp_path).id == "flux/srpo"


def test_every_published_model_says_where_it_comes_from_and_what_its_licence_asks() -> None:
    assert set(list_downloads()) == {"flux/srpo", "flux/dev", "flux/schnell", "safety", "safety-compvis"}
    for repositories in list_downloads().values():
        for part in repositories:
            assert part.licence.conditions
            assert part.licence.url.startswith("https://")
            assert part.revision == "main" or len(part.revision) == 40 or part.sha256


@pytest.mark.parametrize("row", CHECKPOINTS.values(), ids=lambda row: row.id)
def test_a_title_is_prose(row: Checkpoint) -> None:
    """It stands in the start banner and in /v1/models."""
    assert not re.search(r"[A-Z]+_[A-Z]", row.title)
