"""One model on one device, twice: diffusers' stock pipeline and our engine, on the same weights."""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.support.geometry import Model, own_copy
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.engine.sample import Sample
from pipelines.optimize.apply import apply_optimizations
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import select_optimizations
from pipelines.request import GenerationParams, ImageRequest

SIZES = "512x512,1440x512,1024x768,1024x1024,1536x1536"
PROMPT = "a red apple on a wooden table, morning light"
REPEATS = 3  # of a step, for its median
WAITS = "synchronizing CUDA operation"  # what CUDA's check says, in its debug mode, of what waits for the device
FRAMES = 5
Figures = dict[str, Any]


def make_request(width: int, height: int, steps: int, preset: str, seed: int = 7) -> ImageRequest:
    size = {"width": width, "height": height}
    body = {"prompt": PROMPT, "image_size": size, "num_inference_steps": steps, "acceleration": preset, "seed": seed}
    return GenerationParams.model_validate(body).to_request("bench")


class Comparison:
    """One model on one device: the stock pipeline and our engine on the same weights.

    The engine has the optimizations `names`, as far as they work (None: those that are on by default); `failed` says
    why the others do not, `choices` what those that choose have chosen.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        names: Sequence[str] | None = None,
        context: OptimizationContext | None = None,
    ) -> None:
        self.device = device
        self.pipeline = model.pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.text_tokens = model.text_tokens
        plain = FluxEngine(
            own_copy(model.pipeline), EngineOptions(EngineInfo("bench", str(device), "", ""), model.text_tokens)
        )
        if names is None:
            names = select_optimizations(("default",), device.type)
        self.engine, applied = apply_optimizations(plain, names, optional=names, context=context)
        self.failed, self.choices = applied.failed, applied.choices

    def measure_seconds(self, work: Callable[[], object]) -> float:
        """Seconds of a call, with the device synchronized before and after."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run_stock(self, request: ImageRequest, pipeline: Any = None) -> None:
        """Draw with diffusers' pipeline, by default this object's."""
        (pipeline or self.pipeline)(
            request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seeds[0]),
            max_sequence_length=self.text_tokens,
        )

    def run_engine(self, request: ImageRequest) -> None:
        """Draw with our engine."""
        for sample in self.engine.prepare(request):
            while self.engine.steps_left(sample):
                self.engine.step([sample])
            self.engine.finish(sample)

    def prepare_sample(self, width: int, height: int, seed: int) -> Sample:
        """A sample with enough steps ahead of it for `measure_batches`, all of them computed."""
        return self.engine.prepare(make_request(width, height, 2 * REPEATS, "none", seed))[0]

    def measure_stages(self, request: ImageRequest) -> Figures:
        """Seconds of each stage, synchronized. A step is the median of its kind; None where no step is skipped."""
        with torch.inference_mode():
            new = f"{request.prompt}, {request.width} by {request.height}"  # a prompt whose embeddings are not cached
            text = self.measure_seconds(lambda: self.engine.encode(new))
        sample = self.engine.prepare(request)[0]
        steps: dict[bool, list[float]] = {True: [], False: []}
        for compute in sample.computed:
            steps[compute].append(self.measure_seconds(lambda: self.engine.step([sample])))
        medians = {compute: statistics.median(measured) for compute, measured in steps.items() if measured}
        decode = self.measure_seconds(lambda: self.engine.finish(sample))
        return {"text": text, "step": medians[True], "skipped_step": medians.get(False), "decode": decode}

    def measure_ceiling(self) -> float:
        """The best of ten square matrix products, in floating-point operations a second."""
        side = 8192 if self.device.type == "cuda" else 512
        left, right = torch.randn(2, side, side, device=self.device, dtype=self.pipeline.transformer.dtype)
        torch.mm(left, right)
        return 2 * side**3 / min(self.measure_seconds(lambda: torch.mm(left, right)) for _ in range(10))


def find_device_wait(engine: FluxEngine, request: ImageRequest) -> list[str] | None:
    """Where a step waits for the device, as CUDA's own check says: the innermost places in the code, the last of which
    waits. Empty where no step does; None where it cannot be known.
    """
    if engine.device.type != "cuda":
        return None
    samples = engine.prepare(request)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(request.num_inference_steps):
            engine.step(samples)
    except RuntimeError as error:
        if WAITS not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
        return [f"{'/'.join(Path(at.filename).parts[-2:])}:{at.lineno} {at.name}" for at in frames]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []
