"""The safety checkers by name: one row a checker, whose module is imported only when the operator asks for it.

The operator writes `name` or `name:argument`. Several, separated by commas, flag what any of them flags.
"""

import math
import pkgutil
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from PIL import Image


class SafetyChecker(Protocol):
    """Scores pictures. Called from several threads."""

    name: str

    def score(self, picture: Image.Image) -> float:
        """Probability from 0 to 1 that the picture must not be shown; any exception counts as a failure."""
        ...

    def self_test(self) -> None:
        """Prove, before anything is served, that the checker works; raises `SafetyUnavailable`."""
        ...


class CheckerType(NamedTuple):
    """How a checker is built: by `factory` ("module:callable"), which takes the argument, if any, and the options.

    `argument` is what follows the name, in words. `options` are keywords of `load_checker` that the factory takes.
    """

    factory: str
    argument: str | None = None
    options: tuple[str, ...] = ()


CHECKERS: Mapping[str, CheckerType] = {
    "embedded": CheckerType("pipelines.safety.open_nsfw:load_open_nsfw"),
    "folder": CheckerType("pipelines.safety.classifiers:Classifier", "PATH", ("labels", "device")),
    "compvis": CheckerType("pipelines.safety.classifiers:CompVis", "PATH", ("device",)),
    "hook": CheckerType("pipelines.safety.moderation:ImageHook", "URL", ("seconds",)),
}
NONE = "none"


class AnyOf:
    """Several checkers in turn: the highest score counts, and one failure fails all."""

    def __init__(self, checkers: list[SafetyChecker]) -> None:
        self._checkers = checkers
        self.name = " + ".join(checker.name for checker in checkers)

    def score(self, picture: Image.Image) -> float:
        return max_score([checker.score(picture) for checker in self._checkers])

    def self_test(self) -> None:
        for checker in self._checkers:
            checker.self_test()


def max_score(scores: list[float]) -> float:
    """The largest score; NaN, which `max` would lose, stays NaN."""
    return math.nan if any(map(math.isnan, scores)) else max(scores)


def parse_checkers(setting: str) -> list[tuple[str, str]]:
    """(name, argument) of each checker that the setting names; an empty list for `none`. Raises `ValueError`."""
    if setting == NONE:
        return []
    parsed = []
    for part in setting.split(","):
        name, _, argument = part.strip().partition(":")
        row = CHECKERS.get(name)
        if row is None or (row.argument is None) != (not argument):
            forms = [name if row.argument is None else f"{name}:{row.argument}" for name, row in CHECKERS.items()]
            raise ValueError(f"expected {', '.join(forms)}, several of them separated by commas, or {NONE}")
        parsed.append((name, argument))
    return parsed


def load_checker(
    setting: str, *, labels: tuple[str, ...] = (), device: str = "cpu", seconds: float = 10.0
) -> SafetyChecker | None:
    """The checker that the setting names; None for `none`. Raises whatever its factory raises.

    `labels` are those of a classifier that are unsafe, `device` is where its model runs, and `seconds` is
    what a service may take for one picture.
    """
    options = {"labels": labels, "device": device, "seconds": seconds}
    checkers: list[SafetyChecker] = []
    for name, argument in parse_checkers(setting):
        row = CHECKERS[name]
        arguments = [argument] if row.argument else []
        factory = pkgutil.resolve_name(row.factory)
        checkers.append(factory(*arguments, **{option: options[option] for option in row.options}))
    if not checkers:
        return None
    return checkers[0] if len(checkers) == 1 else AnyOf(checkers)
