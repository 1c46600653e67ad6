"""A batch over many engines: hands parts of it out to actors of Ray, and hears what became of each line.

The driver holds the parts that are being drawn and nothing else, so it needs the same memory for ten lines as for a
million. An engine that is lost is replaced, and its parts are drawn by whoever is free; a part that has lost several is
given up, and its lines are failures. Ray Data is not used: docs/cluster.md says why.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from server.batch.lines import CannotGenerate, Line
from server.cluster.engine import EngineUnavailable
from server.cluster.offline_engine import OfflineEngine, Outcome
from server.cluster.session import ADDRESS, QUIET, start_ray
from server.cluster.settings import EngineCount

PART = 20  # lines
DEPTH = 2  # parts that an engine has at a time, so that it never waits for the driver
MAX_LOST = 5  # engines, by one part; or one after the other without a part in between
EngineBuilder = Callable[[], Any]


@dataclass
class Part:
    lines: tuple[Line, ...]
    lost: int = 0  # engines that had it


@contextmanager
def running_ray(settings: EngineCount) -> Iterator[None]:
    """Ray with the GPUs that the engines need: the cluster at `RAY_ADDRESS`, else this machine, until the context ends.

    Raises `CannotGenerate` where a cluster has too few.
    """
    if os.environ.get(ADDRESS):
        ray.init(**QUIET)
    else:
        start_ray(settings)
    try:
        if (there := ray.cluster_resources().get("GPU", 0.0)) < settings.gpus:
            raise CannotGenerate(
                f"{settings.gpus:g} GPUs are needed, Ray has {there:g}: see --engines and --engine-gpus"
            )
        yield
    finally:
        ray.shutdown()


class OfflineActor:
    """An `OfflineEngine` in a process of its own. What is wrong with its arguments is said by `load`."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    async def load(self) -> str:
        self._engine = OfflineEngine(*self._arguments)
        return await self._engine.load()

    async def draw(self, lines: tuple[Line, ...]) -> list[Outcome]:
        return await self._engine.draw(lines)


def build_with(settings: EngineCount, *arguments: Any) -> EngineBuilder:
    """Builds actors that are an `OfflineEngine` of these arguments."""
    actor = ray.remote(OfflineActor).options(num_cpus=0, num_gpus=settings.engine_gpus)
    return lambda: actor.remote(*arguments)


def draw_batch(lines: Iterable[Line], count: int, build: EngineBuilder) -> Iterator[Outcome]:
    """What became of each line, in the order of their ends; `count` engines are built.

    Raises `CannotGenerate` where no engine can be had, or where two would draw other bytes.
    """
    driver = BatchDriver(cut(lines), build)
    for _ in range(count):
        driver.add()
    while driver.busy:
        yield from driver.hear()


def cut(lines: Iterable[Line]) -> Iterator[Part]:
    """The parts. They are always cut in the same places."""
    rest = iter(lines)
    while part := tuple(islice(rest, PART)):
        yield Part(part)


class BatchDriver:
    """The engines and what each has to do."""

    def __init__(self, parts: Iterator[Part], build: EngineBuilder) -> None:
        self._parts = parts
        self._again: deque[Part] = deque()  # that an engine was lost with
        self._build = build
        self._loading: dict[Any, Any] = {}  # a call's reference -> its engine
        self._drawing: dict[Any, tuple[Any, Part]] = {}
        self._idle: list[Any] = []  # an engine for each part that it could have
        self._over = False  # no part is left to hand out for the first time
        self._fingerprint: str | None = None
        self._lost = 0  # since the last part that was drawn

    @property
    def busy(self) -> bool:
        """Whether there is anything to hear: not while only engines that nobody needs are loading."""
        return bool(self._drawing or self._again or not self._over)

    def add(self) -> None:
        engine = self._build()
        self._loading[engine.load.remote()] = engine

    def hear(self) -> Iterator[Outcome]:
        """Wait for the end of one call."""
        (ended,), _ = ray.wait([*self._loading, *self._drawing])
        if ended in self._loading:
            self._admit(ended, self._loading.pop(ended))
        else:
            yield from self._take(ended, *self._drawing.pop(ended))
        while self._idle and (part := self._next()) is not None:
            engine = self._idle.pop()
            self._drawing[engine.draw.remote(part.lines)] = (engine, part)

    def _next(self) -> Part | None:
        if self._again:
            return self._again.popleft()
        part = next(self._parts, None)
        self._over = part is None
        return part

    def _admit(self, ended: Any, engine: Any) -> None:
        try:
            fingerprint = ray.get(ended)
        except RayActorError as error:
            self._replace(error)
            return
        except RayTaskError as error:
            raise CannotGenerate(reason_of(error)) from None
        self._fingerprint = self._fingerprint or fingerprint
        if fingerprint != self._fingerprint:
            raise CannotGenerate("these engines would draw different bytes: their cards or their software differ")
        self._idle += [engine] * DEPTH

    def _take(self, ended: Any, engine: Any, part: Part) -> Iterator[Outcome]:
        try:
            outcomes = ray.get(ended)
        except (RayActorError, EngineUnavailable) as error:
            yield from self._lose(engine, part, error)
        except RayTaskError as error:
            raise CannotGenerate(reason_of(error)) from None
        else:
            self._lost = 0
            self._idle.append(engine)
            yield from outcomes

    def _lose(self, engine: Any, part: Part, error: Exception) -> Iterator[Outcome]:
        """Take the engine's other parts back, and have another engine instead."""
        self._idle = [idle for idle in self._idle if idle is not engine]
        others = [ref for ref, (drawing, _) in self._drawing.items() if drawing is engine]
        self._again.extend(self._drawing.pop(ref)[1] for ref in others)
        ray.kill(engine)
        part.lost += 1
        if part.lost < MAX_LOST:
            self._again.append(part)
        else:
            reason = f"{part.lost} engines were lost with it: {reason_of(error)}"
            yield from ({"line": line.number, "request": line.fields, "error": reason} for line in part.lines)
        self._replace(error)

    def _replace(self, error: Exception) -> None:
        self._lost += 1
        if self._lost > MAX_LOST:
            raise CannotGenerate(f"{self._lost} engines were lost one after the other: {reason_of(error)}")
        self.add()


def reason_of(error: Exception) -> str:
    """What an engine said, or how Ray lost it. Ray's own texts are pages long."""
    cause = getattr(error, "cause", None)
    return str(cause) if cause is not None else type(error).__name__
