"""Too little memory: a clear error for the request that does not fit, and never other bytes than asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import ask, tiny_engine
from support.neighbours import Work, draw

from bench.quality import psnr
from pipelines.engine.base import EngineConfig, Pixels
from pipelines.engine.flux import TILED, FluxEngine
from pipelines.engine.sample import Sample
from pipelines.engine.vae_tiling import SIDE
from pipelines.fields import Size
from pipelines.loading.build import load_engine
from pipelines.optimize.batching import COUNTS

SMALL, LARGE = ask(512, 1024, 2, seed=3), ask(544, 1024, 2, seed=3)  # just below and above half a megapixel


@pytest.fixture
def engine() -> FluxEngine:
    return tiny_engine(torch.bfloat16)


def finished(engine: FluxEngine) -> Pixels:
    sample = engine.prepare(LARGE)[0]
    while engine.steps_left(sample):
        engine.step([sample])
    return engine.finish(sample)


@pytest.mark.parametrize("stage", ["encode", "step", "decode"])
def test_a_request_that_does_not_fit_fails_alone_and_the_worker_goes_on(
    engine: FluxEngine, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbour, in whose passes it was, gets the bytes it gets alone; and so does whoever comes later."""
    engine = engine.change(batches={Size(512, 512): COUNTS})
    good, bad = ask(steps=9, seed=5, acceleration="high"), ask(steps=9, seed=6, acceleration="high", prompt="too large")
    alone = draw(engine, good)
    own = getattr(engine, stage)

    def full(what: Any) -> Any:
        """Out of memory where the bad request is part of it; `what` is a prompt, a sample or several."""
        items = what if isinstance(what, list) else [what]
        if bad.prompt in [item if isinstance(item, str) else item.request.prompt for item in items]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return own(what)

    monkeypatch.setattr(engine, stage, full)
    work = Work(engine, [bad])
    work.admit("watched", good)
    assert work.picture() == alone
    while not work.step_loop.idle:
        work.step_loop.run_once()
    assert work.told.ends == {"0": "OutOfMemory", "watched": "done"}
    monkeypatch.undo()
    assert draw(engine, good) == alone


def test_what_only_steps_need_is_freed_before_decoding(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = engine.prepare(ask(steps=9, acceleration="high"))[0]
    while engine.steps_left(sample):
        engine.step([sample])
    assert sample.residuals.tensors()
    left: list[int] = []
    own = engine.decode

    def decode(sample: Sample) -> Any:
        left.append(len(sample.residuals.tensors()))
        return own(sample)

    monkeypatch.setattr(engine, "decode", decode)
    engine.finish(sample)
    assert left == [0]


def test_tiles_are_for_images_above_the_bound_and_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(torch.float32)
    whole = {request: draw(engine, request) for request in (SMALL, LARGE)}
    assert finished(engine).notes == ()
    engine = engine.change(tile_above=0.5)
    decoded: list[torch.Size] = []
    decoder = engine.pipeline.vae.decoder
    own = decoder.forward

    def forward(latents: torch.Tensor) -> Any:
        decoded.append(latents.shape)
        return own(latents)

    monkeypatch.setattr(decoder, "forward", forward)
    assert draw(engine, SMALL) == whole[SMALL]
    assert decoded == [(1, 16, 1024 // 8, 512 // 8)]
    decoded.clear()
    tiled, notes = finished(engine)
    assert notes == (TILED,)
    assert len(decoded) > 1
    assert max(max(shape[2:]) for shape in decoded) == SIDE // 8
    assert finished(engine)[0] == tiled  # less exact, but the same every time
    pictures = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (tiled, whole[LARGE])]
    assert 30 < psnr(*pictures) < 100
    assert draw(engine, SMALL) == whole[SMALL]


def test_tiles_are_another_fingerprint(tmp_path: Path) -> None:
    config = EngineConfig(device="cpu", tuning_cache=str(tmp_path / "engine.json"))

    def of(config: EngineConfig) -> str:
        return load_engine(config, lambda stage, progress: None).info.fingerprint

    assert of(config) != of(replace(config, tile_above=1.0))
