"""An app in process whose pool at once returns the safety checker's canaries: harmless, one flagged and one not."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from pipelines.engine import EngineConfig, EngineInfo
from pipelines.job import Job
from pipelines.opennsfw import canaries
from pipelines.pool import PoolStatus, WorkerPool
from pipelines.request import ImageRequest, ImageResult, Timings
from pipelines.safety import Guard
from server.app import create_app
from server.settings import Settings

SLOTS = (False, True, False, False)  # which of four images is the canary that must be flagged


class Canaries(WorkerPool):
    """A pool that at once returns the positive canary in some slots and the negative one in the others."""

    def __init__(self, slots: Sequence[bool]) -> None:
        super().__init__(EngineConfig())
        self._slots = slots

    def submit(self, request: ImageRequest, previews: object = None) -> Job:
        job = Job("canaries", request, deadline=float("inf"))
        pictures = canaries(request.width, request.height)
        pixels = tuple(pictures[0 if bad else 1].tobytes() for bad in self._slots)
        job.finish(ImageResult(request, pixels, Timings()))
        return job

    def status(self) -> PoolStatus:
        info = EngineInfo("tiny", "none", "uint8", "f" * 32)
        return PoolStatus("ready", "ready", 1.0, 0.0, 0, 0, 0, (), info, None)


async def post(
    tmp_path: Path, slots: Sequence[bool] = SLOTS, guard: Guard | None = None, **options: Any
) -> httpx.Response:
    """One request for as many images as there are slots; options that are settings are taken out, the others fields."""
    ours = {name: options.pop(name) for name in list(options) if name in Settings.model_fields}
    pool = options.pop("pool", Canaries)
    app = create_app(Settings(data_dir=tmp_path, **ours), pool(slots), guard)
    body = {"model": "flux/srpo", "prompt": "x", "num_images": len(slots), "output_format": "png", "seed": 5}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
        reply = await client.post("/v1/images/generations", json=body | {"image_size": "square"} | options)
        reply.extensions["health"] = (await client.get("/health")).json()
        reply.extensions["fetched"] = [
            (await client.get(item["url"])).content
            for item in reply.json().get("images", [])
            if item.get("url", "").startswith("http")
        ]
    return reply


def decode(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def pictures_below(folder: Path) -> list[bytes]:
    return [decode(path.read_bytes()).tobytes() for path in folder.rglob("*.png")]
