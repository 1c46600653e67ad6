"""An app in process whose pool at once returns the safety checker's canaries: harmless, one flagged and one not.

And a search for pictures in whatever such an app leaves behind.
"""

import base64
import functools
import io
import re
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from pipelines.engine.base import EngineConfig, EngineInfo
from pipelines.job import EventChannel, Job, Preview, PreviewPlan
from pipelines.request import ImageRequest, ImageResult, Timings
from pipelines.safety.guard import Guard
from pipelines.safety.open_nsfw import canaries
from pipelines.workers.pool import WorkerPool
from pipelines.workers.status import PoolStatus
from pipelines.workers.supervisor import local_workers
from server.app import create_app
from server.images.encoding import encode
from server.settings.server import Settings

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"
BASE64 = re.compile(rb"[A-Za-z0-9+/]{64,}={0,2}")
ORIGIN = "http://127.0.0.1:8000"
SLOTS = (False, True, False, False)  # which of four images is the canary that must be flagged


pair_of = functools.cache(canaries)  # by width and height: whoever changes a picture takes a copy


class Canaries(WorkerPool):
    """A pool that at once returns the positive canary in some slots and the negative one in the others."""

    def __init__(self, slots: Sequence[bool]) -> None:
        super().__init__(local_workers(EngineConfig()))
        self._slots = slots

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def submit(
        self,
        request: ImageRequest,
        previews: PreviewPlan = PreviewPlan(),  # noqa: B008 - frozen
        channel: EventChannel | None = None,
        tenant: str = "",
    ) -> Job:
        """A job that is finished already. Its previews are the pictures themselves, as large as the plan allows."""
        job = Job(
            "canaries",
            request,
            deadline=float("inf"),
            previews=previews,
            channel=channel or EventChannel(),
            owns_channel=channel is None,
        )
        pair = pair_of(request.width, request.height)
        pictures = [pair[0 if bad else 1] for bad in self._slots]
        for image, picture in enumerate(pictures):
            for index in range(previews.count):
                small = picture.copy()
                small.thumbnail((previews.side, previews.side))
                job.publish(Preview(image, index, *small.size, small.tobytes()))
        job.finish(ImageResult(request, tuple(picture.tobytes() for picture in pictures), Timings()))
        return job

    def status(self) -> PoolStatus:
        info = EngineInfo("tiny", "none", "uint8", "f" * 32)
        return PoolStatus("ready", "ready", 1.0, 0.0, 0, 0, 0, (), info, None)


@asynccontextmanager
async def talking(
    folder: Path, guard: Guard | None, slots: Sequence[bool], **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that is started, and stopped at the end: with jobs."""
    app = create_app(Settings(data_dir=folder, **settings), Canaries(slots), guard)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        yield client


async def post(
    tmp_path: Path, slots: Sequence[bool] = SLOTS, guard: Guard | None = None, **options: Any
) -> httpx.Response:
    """One request for as many images as there are slots; options that are settings are taken out, the others fields."""
    ours = {name: options.pop(name) for name in list(options) if name in Settings.model_fields}
    pool = options.pop("pool", Canaries)
    app = create_app(Settings(data_dir=tmp_path, **ours), pool(slots), guard)
    body = {"model": "flux/srpo", "prompt": "x", "num_images": len(slots), "output_format": "png", "seed": 5}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ORIGIN) as client:
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


def found_in(data: bytes) -> set[bytes]:
    """The pixels of every whole PNG in `data`, as it is or in base64."""
    starts = (match.start() for match in re.finditer(re.escape(PNG_START), data))
    ends = ((start, data.find(PNG_END, start)) for start in starts)
    pictures = {decode(data[start : end + len(PNG_END)]).convert("RGB").tobytes() for start, end in ends if end > 0}
    texts = [text for text in BASE64.findall(data) if text.startswith(base64.b64encode(PNG_START)[:10])]
    return pictures.union(*(found_in(base64.b64decode(text[: len(text) // 4 * 4])) for text in texts))


def traces_of(picture: Image.Image) -> list[bytes]:
    """What shows that a picture is there, should only a piece of it be: raw, in a PNG of ours, and that in base64."""
    row = 3 * picture.width
    raw = picture.tobytes()[picture.height // 2 * row :][:row]
    file = encode(picture.tobytes(), *picture.size, "png", 95).data
    middle = file[len(file) // 2 :][:48]
    return [raw, middle, *(base64.b64encode(middle[shift : 45 + shift]) for shift in range(3))]


def kept_in(folder: Path) -> bytes:
    """Every byte of every file in a data folder; and the ledger's cells, which its file may hold in pieces."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    with closing(sqlite3.connect(folder / "jobs.sqlite3")) as ledger:
        cells = [str(cell).encode() for row in ledger.execute("SELECT * FROM jobs") for cell in row]
    return b"\n".join(files + cells)
