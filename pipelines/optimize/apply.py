"""Applying optimizations: each is tried before the next one, and the server starts without those that fail here.

An optimization that is on by default may fail: a machine may have no C compiler, or a driver may not know a kernel. It
is then reverted and reported. The failure is recorded in `engine.json`, so that the next start draws the same pictures
and does not try again until `srpo selfcheck --renew`; but one for want of memory or disk space is not, since the next
start may have more. An optimization that the operator named must work: its failure is
an error. A failure that loses the CUDA context is recorded; the worker restarts without that optimization.
"""

import errno
import gc
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name

import torch

from pipelines.engine.base import StartAgain
from pipelines.engine.failures import is_out_of_memory
from pipelines.engine.flux import FluxEngine
from pipelines.fields import Size
from pipelines.optimize.compile import COMPILED, warm_up
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import OPTIMIZATIONS
from pipelines.optimize.tuning_cache import FAILED_OPTIMIZATIONS, TuningCache
from pipelines.request import make_probe

TOLERANCE = 0.25  # of the largest value: more than any optimization's rounding moves a result, float8's included
TEMPORARY_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
PLACE = re.compile(r"at \d+:\d+:")  # where in a kernel: Triton shows its source then, and says last what is wrong
TEMPORARY_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "Cannot allocate memory",
    "Failed to find C compiler",  # Triton's and Inductor's words where there is none: it may be installed tomorrow
    "No working C++ compiler found",
)
TRIAL = make_probe(Size(512, 512), 28, "regular")


class OptimizationFailed(Exception):
    """An optimization that the operator named does not work on this machine."""

    def __init__(self, name: str, reason: str, wanted: Iterable[str]) -> None:
        others = ",".join(other for other in wanted if other != name) or "none"
        super().__init__(f"{name} does not work here: {reason}. Without: SRPO_OPTIMIZATIONS={others}")


@dataclass(slots=True)
class AppliedOptimizations:
    """The choice of each optimization that works ("" where there is none), and the reason of each that failed."""

    choices: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an optimization does not work here, in one line.

    `device_lost`: trying it has made the process unusable. `temporary`: memory or disk space was short, which says
    nothing about the next start.
    """

    reason: str
    device_lost: bool
    temporary: bool


def apply_optimizations(
    engine: FluxEngine,
    wanted: Sequence[str],
    optional: Iterable[str] = (),
    cache: TuningCache | None = None,
    context: OptimizationContext | None = None,
) -> tuple[FluxEngine, AppliedOptimizations]:
    """The engine with all `wanted` optimizations that work, applied in order; the given one must not be used again.

    Raises `OptimizationFailed` where one that is not `optional` fails, and `StartAgain` where the device is lost
    and the `cache` remembers by what.
    """
    applied, optional, base = AppliedOptimizations(), set(optional), engine.info.fingerprint
    context = context or OptimizationContext()
    known: Mapping[str, str] = cache.section(FAILED_OPTIMIZATIONS) if cache else {}
    for name in wanted:
        key = f"{base} {name}"
        if name in optional and key in known:
            applied.failed[name] = known[key]
            continue
        outcome = try_optimization(engine, name, context)
        if not isinstance(outcome, Failure):
            engine, applied.choices[name] = outcome
            continue
        # One that loses the device is always recorded: otherwise the worker would start again without end.
        if name not in optional or (outcome.device_lost and cache is None):
            raise OptimizationFailed(name, outcome.reason, wanted)
        temporary = outcome.temporary and not outcome.device_lost
        reason = outcome.reason if temporary else record_failure(cache, key, outcome.reason)
        if outcome.device_lost:
            raise StartAgain(f"{name} broke the device: {reason}")
        applied.failed[name] = reason
    return engine, applied


def record_failure(cache: TuningCache | None, key: str, reason: str) -> str:
    """The reason that is in the cache from now on: that of another worker, if it was faster."""
    return str(cache.remember(FAILED_OPTIMIZATIONS, key, lambda: reason)) if cache else reason


def try_optimization(engine: FluxEngine, name: str, context: OptimizationContext) -> tuple[FluxEngine, str] | Failure:
    """Apply one, compile what it needs and compare a trial with the engine before. Returns the new engine and the
    choice that was made; after a failure the engine before can be used again, unless the device is lost."""
    optimization, optimized = OPTIMIZATIONS[name], engine
    try:
        before = trial_outputs(engine) if optimization.revert else []
        optimized, choice = apply_optimization(engine, name, context)
        if name in COMPILED:
            warm_up(optimized, name, context.report)
        after = trial_outputs(optimized) if optimization.revert else []
        for expected, actual in zip(before, after, strict=True):
            if not (actual - expected).abs().max() <= TOLERANCE * expected.abs().max():  # also where it is NaN
                raise ArithmeticError("its results are wrong")
        return optimized, choice
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything; the engine works without
        failure = Failure(summarize_error(error), engine.failure(error) is None, is_temporary(error))
        if optimization.revert and not failure.device_lost:
            revert_optimization(optimized, name)
    gc.collect()  # what the failure's traceback still held
    return failure


def apply_optimization(engine: FluxEngine, name: str, context: OptimizationContext) -> tuple[FluxEngine, str]:
    """The optimized engine, on the same pipeline, and the choice that was made."""
    options, choice = resolve_name(OPTIMIZATIONS[name].apply)(engine, context)
    return FluxEngine(engine.pipeline, options), choice


def revert_optimization(engine: FluxEngine, name: str) -> FluxEngine:
    """The engine without an optimization, on the same pipeline. Only those that are not exact can be reverted."""
    revert = OPTIMIZATIONS[name].revert
    assert revert is not None
    return FluxEngine(engine.pipeline, resolve_name(revert)(engine))


@torch.inference_mode()
def trial_outputs(engine: FluxEngine) -> list[torch.Tensor]:
    """A velocity and a picture of values from -1 to 1, of one step."""
    sample = engine.prepare(TRIAL)[0]
    engine.step([sample])
    assert sample.velocity is not None
    picture = torch.frombuffer(bytearray(engine.finish(sample).data), dtype=torch.uint8)
    return [sample.velocity.float(), picture.float() / 127.5 - 1]


def is_temporary(error: Exception) -> bool:
    """Whether memory, disk space or a compiler was missing, also where a compiler wraps the error or quotes it."""
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return True
    if isinstance(error, OSError) and error.errno in TEMPORARY_ERRNOS:
        return True
    if any(text in str(error) for text in TEMPORARY_TEXTS):
        return True
    cause = getattr(error, "inner_exception", None) or error.__cause__
    return isinstance(cause, Exception) and is_temporary(cause)


def summarize_error(error: BaseException) -> str:
    """What went wrong, in one line; of a compiler's error, what caused it."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = lines[-1] if PLACE.fullmatch(lines[0]) else lines[0]
    return f"{type(error).__name__}: {said}"
