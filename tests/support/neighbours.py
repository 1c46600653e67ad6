"""A request drawn among neighbours by the real step loop."""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from support.engines import ask
from support.events import Told

from pipelines.engine.flux import FluxEngine
from pipelines.engine.sample import Sample
from pipelines.request import ImageRequest
from pipelines.workers.step_loop import StepLoop

WATCHED = ask(steps=9, seed=77, acceleration="high", prompt="a lighthouse", guidance_scale=3.5)


class Watched(FluxEngine):
    """An engine that counts in which company the watched request takes its steps."""

    companies: ClassVar[Counter[int]] = Counter()  # anew for each test

    def step(self, samples: Sequence[Sample]) -> None:
        if any(sample.request == WATCHED for sample in samples):
            self.companies[len(samples)] += 1
        super().step(samples)


class Work:
    """A shift with the watched request in it, and neighbours."""

    def __init__(self, engine: FluxEngine, neighbours: list[ImageRequest]) -> None:
        self.told = Told()
        self.step_loop = StepLoop(engine, self.told)
        for number, request in enumerate(neighbours):
            self.admit(str(number), request)

    def admit(self, name: str, request: ImageRequest) -> None:
        self.step_loop.handle(
            {"op": "run", "job": name, "request": request.to_json(), "previews": {"count": 0, "side": 0}}
        )

    def cancel(self, name: str) -> None:
        self.step_loop.handle({"op": "cancel", "job": name})

    def picture(self) -> bytes:
        """Of the watched request, as soon as it is done."""
        while "watched" not in self.told.ends:
            self.step_loop.run_once()
        assert self.told.ends["watched"] == "done"
        return self.told.pictures["watched", 0]


def draw(engine: FluxEngine, request: ImageRequest) -> bytes:
    work = Work(engine, [])
    work.admit("watched", request)
    return work.picture()
