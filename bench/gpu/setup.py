"""What all stages are given: the device, the model to draw with, and how small a rehearsal is."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.support.comparison import Comparison
from bench.support.geometry import MODELS
from pipelines.loading.build import fix_convolutions
from pipelines.optimize.compile import set_cache_folder
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import select_optimizations

Results = Iterator[tuple[str, Any]]  # figures by name, each kept as soon as it is known
NEEDS_CUDA = "not run: needs CUDA"
REHEARSED = ("texts", "rotary", "modulation")  # what is quick on a CPU


@dataclass(frozen=True)
class Setup:
    """Where results go, and whether this is a rehearsal: `tiny` on a CPU, in seconds."""

    folder: Path
    rehearse: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda:0")

    @property
    def model(self) -> str:
        return "tiny" if self.rehearse else "flux"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return ((512, 512),) if self.rehearse else ((1440, 512), (1024, 1024))

    @property
    def steps(self) -> int:
        return 9 if self.rehearse else 28

    @property
    def label(self) -> str:
        """The device, for people and to keep figures of two devices apart."""
        name = "cpu, rehearsal" if self.rehearse else torch.cuda.get_device_name(self.device)
        return f"{name}, torch {torch.__version__}"

    def compare(
        self,
        names: Sequence[str] | None = None,
        context: OptimizationContext | None = None,
        compiled: str = "compiled",
    ) -> Comparison:
        """The stock pipeline, and our engine with the optimizations `names` (None: the default ones).

        `compiled` names the folder of its compile cache, whose keys do not tell what size a graph was tuned for.
        """
        set_cache_folder(self.folder / compiled)
        fix_convolutions()  # as a worker does
        if names is None:
            names = REHEARSED if self.rehearse else select_optimizations(("default",), "cuda")
        # A CPU decodes in bfloat16 a hundred times as slowly.
        model = MODELS[self.model](torch.float32 if self.rehearse else torch.bfloat16, self.device)
        return Comparison(model, self.device, names, context)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of a call, with the device synchronized before and after."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def on_cuda(self, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, where there is CUDA."""
        return NEEDS_CUDA if self.rehearse else measure()
