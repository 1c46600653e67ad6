"""Checkers that the operator brings: classifier folders on tiny random models, and a real moderation service."""

import base64
import inspect
import io
import json
import pkgutil
import threading
import typing
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from pydantic import ValidationError
from support.canaries import SLOTS, pictures_below, post
from support.scripted_server import Scripted
from support.server import START_LIMIT
from support.waiting import LIMIT
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from pipelines.errors import SafetyUnavailable
from pipelines.safety import classifiers
from pipelines.safety.checkers import CHECKERS, CheckerType
from pipelines.safety.classifiers import Classifier, CompVis
from pipelines.safety.guard import make_guard
from pipelines.safety.open_nsfw import canaries
from server.settings.server import Settings

SIDE = 32
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ViT whose head was set, from its own features, to call the positive canary nsfw and its twin normal."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(1)
    config = ViTConfig(**SMALL, image_size=SIDE, patch_size=8, id2label={0: "normal", 1: "nsfw"})
    model = ViTForImageClassification(config).eval()
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    with torch.no_grad():
        pixels = processor(list(canaries()), return_tensors="pt").pixel_values
        bad, good = model.vit(pixels).last_hidden_state[:, 0]
        way = (bad - good) / (bad - good).norm() ** 2
        model.classifier.weight.copy_(torch.stack((-4 * way, 4 * way)))
        middle = 4 * way @ (bad + good) / 2
        model.classifier.bias.copy_(torch.stack((middle, -middle)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion checker with the positive canary as its one concept."""
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(2)
    vision = CLIPVisionConfig(**SMALL, image_size=SIDE, patch_size=8, projection_dim=16)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=16))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    checker = CompVis(str(folder))
    checker.enrol(*canaries())
    checker._model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["vit", "sd"])
async def test_a_folders_verdict_reaches_the_reply(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    row = {"vit": "folder", "sd": "compvis"}[name]
    reply = await post(tmp_path, SLOTS, safety_checker=f"{row}:{folder}")
    assert reply.json()["has_nsfw_concepts"] == list(SLOTS)
    assert reply.json()["safety"]["checker"] == f"{row} ({folder.name})"


async def test_the_threshold_flips_a_classifiers_verdict(vit: Path, tmp_path: Path) -> None:
    lenient = await post(tmp_path, SLOTS, safety_checker=f"folder:{vit}", safety_threshold=0.999)
    strict = await post(tmp_path, SLOTS, safety_checker=f"folder:{vit}", safety_threshold=0.001)
    assert lenient.json()["has_nsfw_concepts"] == [False] * 4
    assert strict.json()["has_nsfw_concepts"] == [True] * 4


def test_the_classifiers_score_is_a_probability_for_the_threshold(vit: Path) -> None:
    bad, good = (Classifier(str(vit)).score(picture) for picture in canaries())
    assert bad == pytest.approx(torch.tensor(4.0).sigmoid().item(), abs=0.05)
    assert good == pytest.approx(1 - bad, abs=0.01)
    reversed_meaning = Classifier(str(vit), ("NORMAL",))
    assert reversed_meaning.score(canaries()[0]) == pytest.approx(good, abs=1e-4)


@pytest.mark.parametrize("labels", [("porn",), ("normal", "nsfw")])
def test_labels_that_cannot_be_meant_are_refused(vit: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(SafetyUnavailable) as refused:
        make_guard(f"folder:{vit}", 0.5, "client", "black", labels)
    assert "normal, nsfw" in refused.value.cause


def test_a_self_test_leaves_the_concepts_as_they_were(sd: Path) -> None:
    checker = CompVis(str(sd))
    before = {name: value.clone() for name, value in checker._model.state_dict().items()}
    checker.self_test()
    assert all(value.equal(before[name]) for name, value in checker._model.state_dict().items())


def test_a_blind_classifier_is_refused(vit: Path, tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(vit)
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((vit / "preprocessor_config.json").read_bytes())
    with pytest.raises(SafetyUnavailable):
        make_guard(f"folder:{tmp_path}", 0.5, "client", "black")


@pytest.mark.parametrize("row", ["folder", "compvis"])
def test_a_folder_without_safetensors_is_refused_and_named(row: str, vit: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((vit / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(SafetyUnavailable) as refused:
        make_guard(f"{row}:{tmp_path}", 0.5, "client", "black")
    assert "model.safetensors" in refused.value.cause


def test_corrupted_weights_are_refused(vit: Path, tmp_path: Path) -> None:
    for file in vit.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (vit / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SafetyUnavailable):
        make_guard(f"folder:{tmp_path}", 0.5, "client", "black")


@pytest.mark.parametrize("value", ["falconsai", "folder", "folder:", "embedded:x", "embedded,none", ""])
def test_a_checker_that_does_not_exist_is_a_clear_error(value: str) -> None:
    with pytest.raises(ValidationError, match="expected embedded, folder:PATH, compvis:PATH, hook:URL"):
        Settings(safety_checker=value)


class Moderator(BaseHTTPRequestHandler):
    """Flags dark middles and the word zebra; or misbehaves as the path says."""

    def do_POST(self) -> None:
        server: Any = self.server
        question = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.seen.append((question["type"], self.headers.get("authorization")))
        grey_question = len(server.seen) == 1  # the self-test's
        if self.path == "/hang" and not grey_question:
            server.released.wait(LIMIT)
            return
        if question["type"] == "prompt":
            flagged = "zebra" in question["prompt"]
        else:
            picture = Image.open(io.BytesIO(base64.b64decode(question["image"].partition(",")[2])))
            pixel = picture.getpixel((picture.width // 2, picture.height // 2))
            assert isinstance(pixel, tuple)
            _, green, blue = pixel
            flagged = blue > 2 * green
        replies = {
            "/500": (500, b"{}"),
            "/vague": (200, b'{"flagged": "yes"}'),
            "/text": (200, b"no"),
            "/301": (301, b""),
        }
        good = (200, json.dumps({"flagged": flagged}).encode())
        status, body = good if grey_question else replies.get(self.path, good)
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.send_header("location", "/")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def moderator() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Moderator)
    server.seen, server.released = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


async def test_the_operators_service_decides_beside_the_embedded_checker(tmp_path: Path, moderator: Any) -> None:
    url = f"http://me:pass%20word@127.0.0.1:{moderator.server_port}/check"
    reply = await post(tmp_path, SLOTS, safety_checker=f"embedded,hook:{url}", prompt="secret words")
    body = reply.json()
    assert body["has_nsfw_concepts"] == list(SLOTS)
    assert body["safety"]["checker"].endswith("+ hook (127.0.0.1)")
    basic = "Basic " + base64.b64encode(b"me:pass word").decode()
    assert moderator.seen == [("image", basic)] * 5  # the self-test, and four images
    alone = await post(tmp_path / "alone", SLOTS, safety_checker=f"hook:{url}")
    assert alone.json()["has_nsfw_concepts"] == list(SLOTS)


@pytest.mark.parametrize("path", ["/500", "/vague", "/text", "/301", "/hang"])
async def test_a_service_without_a_clear_answer_shows_nothing(tmp_path: Path, moderator: Any, path: str) -> None:
    url = f"http://127.0.0.1:{moderator.server_port}{path}"
    reply = await post(tmp_path, safety_checker=f"hook:{url}", safety_timeout=10)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "safety_unavailable"
    assert pictures_below(tmp_path) == []


def test_a_service_that_is_not_there_is_refused_at_the_start() -> None:
    with pytest.raises(SafetyUnavailable):
        make_guard("hook:http://127.0.0.1:9/", 0.5, "client", "black")
    with pytest.raises(SafetyUnavailable):
        make_guard("hook:ftp://127.0.0.1/", 0.5, "client", "black")


def test_a_finished_request_is_found_by_its_key_while_the_service_is_away(
    tmp_path: Path, moderator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    hook = f"http://127.0.0.1:{moderator.server_port}/"
    with Scripted(tmp_path, prompt_hook=hook, safety_checker="none") as server:

        def ask(key: str) -> httpx.Response:
            body = {"model": "flux/srpo", "prompt": "a horse", "image_size": "square", "num_inference_steps": 1}
            headers = {"idempotency-key": key}
            return httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=START_LIMIT)

        first = ask("one")
        moderator.shutdown()
        moderator.server_close()
        again, another = ask("one"), ask("another")
    assert (first.status_code, again.status_code, another.status_code) == (201, 201, 503)
    assert again.text == first.text


async def test_the_service_may_refuse_prompts(tmp_path: Path, moderator: Any) -> None:
    url = f"http://127.0.0.1:{moderator.server_port}/"
    refused = await post(tmp_path, (False,), prompt_hook=url, prompt="a zebra")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "prompt_refused"
    assert (await post(tmp_path, (False,), prompt_hook=url, prompt="a horse")).status_code == 201
    moderator.seen[:] = [("image", None)]
    unclear = await post(tmp_path, (False,), prompt_hook=f"{url}500", prompt="a horse")
    assert unclear.status_code == 503


def test_the_usual_labels_are_written_in_lower_case() -> None:
    assert {name.lower() for name in classifiers.UNSAFE} == classifiers.UNSAFE


@pytest.mark.parametrize("row", CHECKERS.values(), ids=list(CHECKERS))
def test_every_row_of_the_table_names_something_that_scores_pictures(row: CheckerType) -> None:
    factory = pkgutil.resolve_name(row.factory)
    made: Any = factory if isinstance(factory, type) else typing.get_type_hints(factory)["return"]
    assert callable(made.score)
    assert callable(made.self_test)
    assert set(row.options) <= set(inspect.signature(factory).parameters)
