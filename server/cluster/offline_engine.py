"""One engine of a batch: draws parts of it on a device of its own, and puts the pictures where they belong.

It knows nothing of Ray. Drawing a part a second time gives the same bytes under the same names: a request without a
seed gets one that follows from its number and its fields.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.errors import Draining, NotReady, PipelineError, WorkersSuspended
from pipelines.request import MAX_DRAWN_SEED
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.batch.bucket import BatchBucket
from server.batch.drawing import Drawing
from server.batch.items import BatchItem, make_item
from server.batch.lines import CannotGenerate, Line
from server.cluster.engine import EngineUnavailable, wait_ready
from server.engine_setup import build_engine_config, build_patience
from server.images.decoding import UnusableImage
from server.settings.engine import EngineSettings

AT_A_TIME = 2  # requests: one is drawn while another one is checked, encoded and stored
STUCK = 600.0  # seconds without a worker after which this engine can no longer help
Outcome = dict[str, Any]  # `line` and either `error`, or `seed` and `files`; `new` if it was drawn now


class OfflineEngine:
    """`url` and `endpoint` are the bucket's; its credentials come from this process's environment."""

    def __init__(self, settings: EngineSettings, url: str, endpoint: str | None, factory: str | None = None) -> None:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = build_engine_config(settings, settings.data_dir)
        if factory is not None:
            config = replace(config, factory=factory)
        self._settings = settings
        self._bucket = BatchBucket(url, endpoint, os.environ)
        self._model = config.model
        self._pool = WorkerPool(
            local_workers(config, settings.devices, build_patience(settings)),
            queue_size=AT_A_TIME,
            request_timeout=float("inf"),
        )
        self._drawing = Drawing(settings, self._pool, config.model)
        self._places = asyncio.Semaphore(AT_A_TIME)

    async def load(self) -> str:
        """The engine's fingerprint, when it is ready. Raises `EngineUnavailable` if the model cannot be loaded."""
        await self._pool.start()
        await wait_ready(self._pool)
        info = self._pool.status().info
        assert info is not None
        return info.fingerprint

    async def stop(self) -> None:
        await self._pool.stop()

    async def draw(self, lines: Sequence[Line]) -> list[Outcome]:
        """What became of each line of a part. Raises `EngineUnavailable` where this engine can no longer help."""
        threads, first = self._drawing.threads, lines[0].number
        records = await threads.run("storing", self._bucket.read_part, first)
        finished = {(record.get("line"), key_of(record["request"])): record for record in records}
        found = [finished.get((line.number, key_of(line.fields))) for line in lines]
        ended = await asyncio.gather(*map(self._draw_line, lines, found))
        if any(outcome.get("new") for outcome, _ in ended):
            await threads.run("storing", self._bucket.write_part, first, [record for _, record in ended if record])
        return [outcome for outcome, _ in ended]

    async def _draw_line(self, line: Line, record: Outcome | None) -> tuple[Outcome, Outcome | None]:
        """What became of it, and what is to be written down."""
        outcome: Outcome = {"line": line.number}
        if record is not None:
            return outcome | {"seed": record["seed"], "files": record["files"]}, record
        async with self._places:
            try:
                if line.fault is not None:
                    raise CannotGenerate(line.fault)
                item = make_item(line.number, line.fields, self._model, chosen=choose_seed(line))
                await self._draw_item(item)
            except (CannotGenerate, PipelineError, UnusableImage) as error:
                request = {} if line.fault else {"request": line.fields}
                return outcome | request | {"error": str(error)}, None
        record = outcome | item.record()
        return outcome | {"seed": record["seed"], "files": record["files"], "new": True}, record

    async def _draw_item(self, item: BatchItem) -> None:
        begun = time.monotonic()
        while True:
            try:
                inspected = await self._drawing.draw(item)
                break
            except (Draining, NotReady, WorkersSuspended) as error:  # its own worker is being replaced
                if self._pool.failed.is_set() or time.monotonic() - begun > STUCK:
                    raise EngineUnavailable(str(error)) from error
                await asyncio.sleep(0.5)
        threads, signer = self._drawing.threads, self._drawing.signer
        images = await threads.run("encoding", lambda: list(item.encode(inspected, self._settings, signer)))
        for name, image in images:
            await threads.run("storing", self._bucket.put, name, image.data, image.content_type)


def key_of(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True)


def choose_seed(line: Line) -> dict[str, int]:
    """A seed for a line that names none: always the same, so that two engines never draw it differently."""
    if "seed" in line.fields:
        return {}
    digest = hashlib.sha256(f"{line.number} {key_of(line.fields)}".encode()).digest()
    return {"seed": int.from_bytes(digest[:8]) % MAX_DRAWN_SEED + 1}
