"""Pulling levers: each is tried before the next one, and the server comes up without what does not work here.

A lever that nobody named may fail: a machine without a C compiler, a kernel that its driver does not know. It is
undone, said, kept in `engine.json` (so that the next start makes the same pictures) and not tried again until `srpo
selfcheck --renew`. One that the operator named is an error. So is neither: a fault that takes the device with it is
kept, and a new process goes on without.
"""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from pipelines.engine.base import Report, StartAgain
from pipelines.engine.flux import FluxEngine
from pipelines.optimize.compile import COMPILED, warm_up
from pipelines.optimize.optimizations import OPTIMIZATIONS
from pipelines.optimize.tuning_cache import OPTIMIZATIONS as SECTION
from pipelines.optimize.tuning_cache import TuningCache
from pipelines.request import ImageRequest

WRONG = 0.25  # of the largest value: more than rounding ever moves a result, float8's included
TRIAL = ImageRequest("", "a red apple", 512, 512, 28, 4.5, (1,), "regular")


class OptimizationFailed(Exception):
    """A lever that was asked for by name does not work on this machine."""

    def __init__(self, name: str, reason: str, wanted: Iterable[str]) -> None:
        others = ",".join(other for other in wanted if other != name) or "none"
        super().__init__(f"{name} does not work here: {reason}. Without: SRPO_OPTIMIZATIONS={others}")


@dataclass(slots=True)
class AppliedOptimizations:
    """The levers that work, with the choice each made (if it had one), and those that do not, with the reason."""

    choices: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def apply_optimizations(
    engine: FluxEngine,
    wanted: Sequence[str],
    optional: Iterable[str] = (),
    cache: TuningCache | None = None,
    report: Report = lambda *_: None,
) -> AppliedOptimizations:
    """Pull levers in order. Raises `OptimizationFailed` for one that is not `optional`, `StartAgain`."""
    applied, optional, base = AppliedOptimizations(), set(optional), engine.info.fingerprint
    known = cache.section(SECTION) if cache else {}
    for name in wanted:
        key = f"{base} {name}"
        reason = known.get(key) if name in optional else None
        if reason is None:
            reason, lost = try_optimization(engine, name, applied, report)
            if reason is not None and name not in optional:
                raise OptimizationFailed(name, reason, wanted)
            if reason is not None and cache:
                reason = str(cache.remember(SECTION, key, lambda reason=reason: reason))  # type: ignore[misc]
            if lost:
                raise StartAgain(f"{name} broke the device: {reason}")
        if reason is not None:
            applied.failed[name] = reason
    return applied


def try_optimization(
    engine: FluxEngine, name: str, applied: AppliedOptimizations, report: Report
) -> tuple[str | None, bool]:
    """Pull one, and see that it works. Returns why it does not, if so, and whether that has taken the device along."""
    optimization = OPTIMIZATIONS[name]
    try:
        before = trial_outputs(engine) if optimization.revert else []
        choice = optimization.apply(engine)
        if name in COMPILED:
            warm_up(engine, name, report)
        for was, now in zip(before, trial_outputs(engine) if optimization.revert else [], strict=True):
            if not (now - was).abs().max() <= WRONG * was.abs().max():  # a NaN is not
                raise ArithmeticError("its results are wrong")
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything; the engine works without
        reason, lost = said(error), engine.failure(error) is None
        if optimization.revert and not lost:
            optimization.revert(engine)
    else:
        applied.choices[name] = choice
        return None, False
    gc.collect()  # what the failure's traceback still held
    return reason, lost


@torch.inference_mode()
def trial_outputs(engine: FluxEngine) -> list[torch.Tensor]:
    """A velocity and a picture of values from -1 to 1, of one step."""
    sample = engine.prepare(TRIAL)[0]
    engine.step([sample])
    assert sample.velocity is not None
    picture = torch.frombuffer(bytearray(engine.finish(sample).data), dtype=torch.uint8)
    return [sample.velocity.float(), picture.float() / 127.5 - 1]


def said(error: BaseException) -> str:
    """What went wrong, in one line; of a compiler's error, what was behind it."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
