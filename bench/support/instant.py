"""A pool that answers at once: what is left of a request's time is the server's own part of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from pipelines.engine.base import EngineConfig, EngineInfo
from pipelines.job import Job
from pipelines.request import ImageRequest, ImageResult, Timings
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers

Draw = Callable[[ImageRequest], tuple[int, int, bytes]]  # width, height, and the pixels of each image


class InstantPool(WorkerPool):
    """Every request is done when it is submitted, with what `draw` returns for it, or fails with what it raises."""

    def __init__(self, config: EngineConfig, draw: Draw) -> None:
        super().__init__(local_workers(config))
        self._draw = draw

    async def start(self) -> None:
        self._info = EngineInfo("tiny", "cpu", "float32", "f" * 32)

    async def stop(self) -> None:
        pass

    def submit(self, request: ImageRequest, previews: object = None, channel: object = None, tenant: str = "") -> Job:  # noqa: ARG002 - a `WorkerPool`
        width, height, pixels = self._draw(request)
        job = Job("job", request, deadline=math.inf)
        drawn = replace(request, width=width, height=height)
        job.finish(ImageResult(drawn, (pixels,) * len(request.seeds), Timings()))
        return job


def draw_black(request: ImageRequest) -> tuple[int, int, bytes]:  # noqa: ARG001 - whatever is asked for
    """16 by 16 black pixels: nothing to check or to encode."""
    return 16, 16, bytes(16 * 16 * 3)


def draw_noise(request: ImageRequest) -> tuple[int, int, bytes]:
    """A picture of the request's size that takes about as many bytes as a photograph."""
    return request.width, request.height, noise(request.width, request.height)


@cache
def noise(width: int, height: int) -> bytes:
    """8-bit RGB noise with the spectrum of photographs: each octave of detail has half the amplitude of the last."""
    chance = np.random.default_rng(7)
    total = np.zeros((height, width, 3), np.float32)
    amplitude, cells = 90.0, 4
    while cells <= min(width, height) // 2:
        coarse = chance.normal(size=(cells, cells, 3)).astype(np.float32)
        layers = [
            Image.fromarray(coarse[..., band]).resize((width, height), Image.Resampling.BICUBIC) for band in range(3)
        ]
        total += amplitude * np.stack([np.asarray(layer) for layer in layers], axis=-1)
        amplitude, cells = amplitude / 2, cells * 2
    return (128 + total).clip(0, 255).astype(np.uint8).tobytes()
