"""An engine that sleeps as long as a card would compute, so that many cards fit into one machine without any.

What it sleeps for each kind of request is in the environment variable `SLEEPING_PLANS`.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.support.instant import draw_noise, noise
from bench.support.plans import Kind, Plan
from pipelines.engine.base import NO_STATISTICS, EngineConfig, EngineInfo, EngineStatistics, Pixels, Report
from pipelines.request import ImageRequest

VARIABLE = "SLEEPING_PLANS"


def key_of(request: ImageRequest) -> str:
    return f"{request.acceleration}:{request.width}x{request.height}:{request.steps}"


def dump_plans(kinds: Sequence[Kind]) -> str:
    """For the environment of the process that starts the workers."""
    return json.dumps({key_of(kind.request): [kind.plan.text, kind.plan.steps, kind.plan.decode] for kind in kinds})


@dataclass(eq=False)
class Sample:
    request: ImageRequest
    taken: int = 0  # steps


class SleepingEngine:
    """`plans` by `key_of` a request. Every sample takes its steps alone."""

    info = EngineInfo("sleeping", "none", "none", "f" * 32)

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self._plans = plans

    def prepare(self, request: ImageRequest) -> list[Sample]:
        time.sleep(self._plans[key_of(request)].text)
        return [Sample(request) for _ in request.seeds]

    def step(self, samples: Sequence[Sample]) -> None:
        (sample,) = samples
        time.sleep(self._plans[key_of(sample.request)].steps[sample.taken])
        sample.taken += 1

    def batch_limit(self, request: ImageRequest) -> int:  # noqa: ARG002 - an `Engine`
        return 1

    def select_batch(self, candidates: Sequence[Sample]) -> list[Sample]:
        return list(candidates[:1])

    def steps_left(self, sample: Sample) -> int:
        return sample.request.steps - sample.taken

    def preview(self, sample: Sample, side: int) -> None:  # noqa: ARG002 - an `Engine`
        return None

    def finish(self, sample: Sample) -> Pixels:
        time.sleep(self._plans[key_of(sample.request)].decode)
        return Pixels(draw_noise(sample.request)[2])

    def statistics(self) -> EngineStatistics:
        return NO_STATISTICS

    def failure(self, error: Exception) -> str:  # noqa: ARG002 - an `Engine`
        return "GenerationFailed"


def load(config: EngineConfig, report: Report) -> SleepingEngine:  # noqa: ARG001 - an engine's factory
    plans = {
        key: Plan(text, tuple(steps), decode) for key, (text, steps, decode) in json.loads(os.environ[VARIABLE]).items()
    }
    engine = SleepingEngine(plans)
    for key in plans:  # pictures are made before the engine is ready
        width, height = map(int, key.split(":")[1].split("x"))
        noise(width, height)
    return engine
