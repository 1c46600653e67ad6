"""Decides whether a finished image may be shown. It fails closed: an image that could not be checked is not shown.

A checker (`pipelines.safety.checkers`) scores one picture from 0 to 1. The guard applies the operator's threshold,
policy (which requests are checked) and action (what becomes of a flagged image).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image, ImageFilter

from pipelines.errors import ContentWithheld, SafetyUnavailable
from pipelines.request import ImageResult
from pipelines.safety.checkers import SafetyChecker, load_checker

POLICIES: Mapping[str, str] = {  # and what they mean, where the name does not say it
    "client": "enable_safety_checker in the request decides",
    "always": "",
    "never": "",
}
BLUR = 12  # the blur radius is the shorter side divided by this: no outline survives


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard did, for the reply's `safety` object."""

    checked: bool
    checker: str
    threshold: float | None = None
    action: str | None = None


@dataclass(frozen=True, slots=True)
class InspectedResult:
    """A result without the pixels that were withheld. `flagged` has one entry for each image."""

    result: ImageResult
    flagged: tuple[bool, ...]
    verdict: Verdict

    @property
    def withheld(self) -> tuple[bool, ...]:
        """Which images differ from what the model drew."""
        return tuple(flag and self.verdict.action != "flag" for flag in self.flagged)


def blacken(picture: Image.Image) -> Image.Image:
    return Image.new("RGB", picture.size)


def blur(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(min(picture.size) / BLUR))


def keep(picture: Image.Image) -> Image.Image:
    return picture


class Action(NamedTuple):
    """What becomes of a flagged image, and, where the action's name does not say it, what the action means."""

    replace: Callable[[Image.Image], Image.Image]
    description: str = ""


ACTIONS: Mapping[str, Action] = {
    "black": Action(blacken),
    "blur": Action(blur),
    "error": Action(blacken, "an error if every image is flagged, else black"),
    "flag": Action(keep, "the image is unchanged and marked in the reply"),
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
        """Prove that the checker works, before anything is served; raises `SafetyUnavailable`."""
        if self._checker is not None:
            self._checker.self_test()

    def withholds(self, wanted: bool) -> bool:
        """Whether an image of such a request may be withheld at the end."""
        return self.checks(wanted) and self._action != "flag"

    def checks(self, wanted: bool) -> bool:
        """Whether the images of such a request are checked."""
        return self._checker is not None and (self._policy == "always" or wanted)

    def inspect(self, result: ImageResult, wanted: bool) -> InspectedResult:
        """Check every image and replace what must not be shown. Raises `SafetyUnavailable` or `ContentWithheld`."""
        count = len(result.pixels)
        if self._checker is None or not self.checks(wanted):
            return InspectedResult(result, (False,) * count, Verdict(False, "none"))
        size = (result.request.width, result.request.height)
        pictures = [Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1) for pixels in result.pixels]
        flagged = tuple(self._score(picture) >= self._threshold for picture in pictures)
        if self._action == "error" and all(flagged):
            raise ContentWithheld
        withhold = ACTIONS[self._action].replace
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


def make_guard(
    checker: str,
    threshold: float,
    policy: str,
    action: str,
    labels: tuple[str, ...] = (),
    device: str = "cpu",
    seconds: float = 10.0,
) -> Guard:
    """The guard for these settings, after its self-test. Raises `SafetyUnavailable`."""
    try:
        loaded = load_checker(checker, labels=labels, device=device, seconds=seconds) if policy != "never" else None
        guard = Guard(loaded, threshold, policy, action)
        guard.self_test()
    except SafetyUnavailable:
        raise
    except Exception as error:  # a missing library, an unreadable file: no server without a checker
        raise SafetyUnavailable(f"the {checker} checker cannot be loaded ({type(error).__name__}: {error})") from error
    return guard
