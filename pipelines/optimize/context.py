"""What an optimization is given, and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.engine.base import Report
from pipelines.engine.options import EngineOptions
from pipelines.fields import Size


def measure_anew(_section: str, measure: Callable[[], str]) -> str:
    """Remember nothing."""
    return measure()


@dataclass(frozen=True, slots=True)
class OptimizationContext:
    """What applying the rows of `OPTIMIZATIONS` needs beside the engine.

    `compiler` is a backend of `torch.compile` that takes Inductor's options. `remember(section, measure)` returns what
    was measured on this device before, or else measures now: a choice that moves bits must stay the same.
    `batch_sizes` are the sizes that the operator wants batched where that is exact. `report` is told of all that takes
    long.
    """

    compiler: Any = "inductor"
    remember: Callable[[str, Callable[[], str]], str] = measure_anew
    batch_sizes: tuple[Size, ...] = ()
    report: Report = lambda *_: None


class Change(NamedTuple):
    """The options of the optimized engine, and the choice that was made on the way, if there was one to make."""

    options: EngineOptions
    choice: str = ""
