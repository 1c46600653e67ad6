"""The safety checkers by name: one row a checker.

A checker is asked for as `name` or `name:argument`; several, separated by commas, flag what any of them flags.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from pipelines.safety import classifiers
from pipelines.safety import open_nsfw as opennsfw
from pipelines.safety.moderation import ImageHook


class SafetyChecker(Protocol):
    """Scores pictures. Called from several threads."""

    name: str

    def score(self, picture: Image.Image) -> float:
        """Probability from 0 to 1 that the picture must not be shown; any exception counts as a failure."""
        ...

    def self_test(self) -> None:
        """Prove, before anything is served, that the checker works; raises `SafetyUnavailable`."""
        ...


@dataclass(frozen=True, slots=True)
class CheckerConfig:
    """What the operator says about a checker: what follows its name, which labels are unsafe, and the device."""

    argument: str = ""
    labels: tuple[str, ...] = ()
    device: str = "cpu"


def embedded(_: CheckerConfig) -> SafetyChecker:
    return opennsfw.embedded()


def folder(config: CheckerConfig) -> SafetyChecker:
    return classifiers.Classifier(config.argument, config.labels, config.device)


def compvis(config: CheckerConfig) -> SafetyChecker:
    return classifiers.CompVis(config.argument, config.device)


def hook(config: CheckerConfig) -> SafetyChecker:
    return ImageHook(config.argument)


class Row(NamedTuple):
    """A checker: how it is made, and what its argument is, where it has one."""

    make: Callable[[CheckerConfig], SafetyChecker]
    argument: str | None = None


CHECKERS: Mapping[str, Row] = {
    "embedded": Row(embedded),
    "folder": Row(folder, "PATH"),
    "compvis": Row(compvis, "PATH"),
    "hook": Row(hook, "URL"),
}
NONE = "none"


class AnyOf:
    """Several checkers in turn: the highest score counts, and one failure fails all."""

    def __init__(self, checkers: list[SafetyChecker]) -> None:
        self._checkers = checkers
        self.name = " + ".join(checker.name for checker in checkers)

    def score(self, picture: Image.Image) -> float:
        return highest([checker.score(picture) for checker in self._checkers])

    def self_test(self) -> None:
        for checker in self._checkers:
            checker.self_test()


def highest(scores: list[float]) -> float:
    """The largest score; NaN, which `max` would lose, stays NaN."""
    return math.nan if any(map(math.isnan, scores)) else max(scores)


def spelled(spec: str) -> list[tuple[str, str]]:
    """(name, argument) of each checker of a setting's value; none of them for `none`. Raises `ValueError`."""
    if spec == NONE:
        return []
    parts = []
    for part in spec.split(","):
        name, _, argument = part.strip().partition(":")
        row = CHECKERS.get(name)
        if row is None or (row.argument is None) != (not argument):
            forms = [name if row.argument is None else f"{name}:{row.argument}" for name, row in CHECKERS.items()]
            raise ValueError(f"expected {', '.join(forms)}, several of them separated by commas, or {NONE}")
        parts.append((name, argument))
    return parts


def load(spec: str, labels: tuple[str, ...] = (), device: str = "cpu") -> SafetyChecker | None:
    """The checker that a setting asks for; None for `none`. Raises whatever its making raises."""
    made = [CHECKERS[name].make(CheckerConfig(argument, labels, device)) for name, argument in spelled(spec)]
    if not made:
        return None
    return made[0] if len(made) == 1 else AnyOf(made)
