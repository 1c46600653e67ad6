"""What a worker needs of an engine, and how an engine is configured. Imports no torch.

The worker drives any `Engine`. `EngineConfig.factory` names the function that builds one, so tests and other back ends
can use their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from pipelines.imports import import_name
from pipelines.logs import LogFormat
from pipelines.request import ImageRequest

Report = Callable[[str, float], None]  # stage in words, progress from 0 to 1
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What one worker serves. `device` and `dtype` are `auto` or torch's names (`cuda:0`, `bfloat16`).

    `tuning_cache` is the file of what was measured on the device; without one no batch is tried and there is no
    self-check. `batch_sizes` are the sizes (`512x512`) to batch if that is exact.
    Images of more than `tile_above` megapixels are decoded in tiles; None: never.
    `transformer` (a file or folder) takes the place of the model's own; `loras` (`FILE:SCALE`) are merged into it.
    `placement` is `auto` or a row of `placement.PLACEMENTS`.
    `optimizations` are names of `OPTIMIZATIONS`, `default` or `none`; `compile_cache` is a folder for compiled kernels.
    `verify_weights` reads every byte of pulled weights before they are loaded, not only samples of them.
    `log_format` is the format of the worker's log lines. `processes` of this machine load the model in all.
    """

    model: str = "tiny"
    models_dir: str = "models"
    device: str = "auto"
    dtype: str = "auto"
    tuning_cache: str | None = None
    batch_sizes: tuple[str, ...] = ()
    tile_above: float | None = None
    transformer: str | None = None
    loras: tuple[str, ...] = ()
    placement: str = "auto"
    optimizations: tuple[str, ...] = ("default",)
    compile_cache: str | None = None
    verify_weights: bool = False
    log_format: LogFormat = "console"
    processes: int = 1
    factory: str = "pipelines.loading.build:load_engine"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def build(self, report: Report) -> "Engine[Any]":
        engine: Engine[Any] = import_name(self.factory)(self, report)
        return engine


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is loaded and where, for people and for the header `x-engine-fingerprint`.

    `max_pixels` are those of the largest image that the device has memory for; None: all sizes fit.
    """

    model: str
    device: str
    dtype: str
    fingerprint: str
    placement: str = ""
    optimizations: str = "none"  # in words
    device_type: str = ""  # torch's: `cuda` or `cpu`; what `auto` meant
    max_pixels: int | None = None


class StartAgain(Exception):
    """Loading has lost the device. The cause is recorded; a new process loads without it."""


class Pixels(NamedTuple):
    """One finished image: 8-bit RGB, row-major."""

    data: bytes
    notes: tuple[str, ...] = ()


class Thumbnail(NamedTuple):
    """A rough small picture of an image that is being drawn: 8-bit RGB, row-major."""

    width: int
    height: int
    data: bytes


class EngineStatistics(NamedTuple):
    """Counted since the engine was built. `caches`: hits and misses by name; `memory`: the device's, in bytes by kind
    (allocated, reserved, peak), empty where the device is the CPU."""

    caches: dict[str, tuple[int, int]]
    memory: dict[str, int]


NO_STATISTICS = EngineStatistics({}, {})


class Engine(Protocol[S]):
    """Draws images one step at a time. `S` is its sample: the state of one image."""

    info: EngineInfo

    def prepare(self, request: ImageRequest) -> list[S]:
        """Encode the prompt and draw the noise: one sample for each of `request.seeds`."""
        ...

    def step(self, samples: Sequence[S]) -> None:
        """Take one denoising step of all samples in one forward pass. If it raises, all of them are as before.

        `samples` is a single one, or what `select_batch` returned.
        """
        ...

    def batch_limit(self, request: ImageRequest) -> int:
        """How many samples of this request's size can share a forward pass at most: more candidates are not needed."""
        ...

    def select_batch(self, candidates: Sequence[S]) -> list[S]:
        """The first candidate, and those of the others that take the next step in one forward pass with it.

        The one place where the batch is decided: only numbers of samples that change no bit are allowed.
        """
        ...

    def steps_left(self, sample: S) -> int: ...

    def preview(self, sample: S, side: int) -> Thumbnail | None:
        """The sample as it looks so far, `side` pixels at most on its longer side; None if it has no previews."""
        ...

    def finish(self, sample: S) -> Pixels:
        """Decode. Raises `NonFinitePixels`, never returns a broken picture."""
        ...

    def statistics(self) -> EngineStatistics:
        """For monitoring. Does not wait for the device."""
        ...

    def failure(self, error: Exception) -> str | None:
        """The name of this error's `GenerationFailed` class; None if the device is lost and the process must end."""
        ...
