"""Same seed, same bytes: whoever else is drawn, in whatever company, and whatever happens to them.

A worker's own turns (`StepLoop`) around the tiny model, in bfloat16 with batches allowed.
"""

import random
from dataclasses import replace

import pytest
import torch
from support.engines import ask, tiny_engine
from support.neighbours import WATCHED, Watched, Work, draw

from pipelines.acceleration import PRESETS
from pipelines.engine.flux import FluxEngine
from pipelines.engine.sample import Sample
from pipelines.fields import Size
from pipelines.optimize.batching import COUNTS
from pipelines.request import ImageRequest

SIZES = [(512, 512), (512, 512), (512, 544), (576, 512)]


@pytest.fixture(scope="module")
def engine() -> FluxEngine:
    plain = tiny_engine(torch.bfloat16)
    return Watched(plain.pipeline, replace(plain.options, batches={Size(512, 512): COUNTS}))


@pytest.fixture(scope="module")
def alone(engine: FluxEngine) -> bytes:
    return draw(engine.change(batches={}), WATCHED)


@pytest.fixture(autouse=True)
def _count_anew(engine: Watched, alone: bytes) -> None:
    engine.companies.clear()


def anybody(chance: random.Random) -> ImageRequest:
    width, height = chance.choice(SIZES)
    return ask(
        width,
        height,
        chance.randint(1, 14),
        seed=chance.randint(1, 10**6),
        num_images=chance.randint(1, 2),
        acceleration=chance.choice(list(PRESETS)),
        guidance_scale=chance.uniform(1, 20),
        prompt="".join(chr(chance.randint(32, 0x2FF)) for _ in range(chance.randint(1, 60))),
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_among_sixteen_random_neighbours(engine: FluxEngine, alone: bytes, seed: int) -> None:
    chance = random.Random(seed)
    work = Work(engine, [anybody(chance) for _ in range(8)])
    work.admit("watched", WATCHED)
    for number in range(8, 16):
        work.step_loop.run_once()
        work.admit(str(number), anybody(chance))
    assert work.picture() == alone


@pytest.mark.parametrize("count", COUNTS)
def test_in_each_company_that_is_allowed(engine: Watched, alone: bytes, count: int) -> None:
    mates = [replace(WATCHED, seeds=(seed,), prompt=f"{seed} boats", guidance_scale=seed) for seed in range(1, count)]
    work = Work(engine, mates)
    work.admit("watched", WATCHED)
    assert work.picture() == alone
    assert engine.companies == {count: 9}


@pytest.mark.long
def test_after_a_neighbour_was_cancelled_at_every_step(engine: Watched, alone: bytes) -> None:
    """It shares passes up to then; its place stays empty, or another takes it."""
    mate = replace(WATCHED, seeds=(3,), guidance_scale=9.0)
    for step in range(10):
        work = Work(engine, [mate])
        work.admit("watched", WATCHED)
        for _ in range(step):
            work.step_loop.run_once()
        work.cancel("0")
        if step % 2:
            work.admit("1", replace(mate, num_inference_steps=12))
        assert work.picture() == alone
    assert set(engine.companies) == {1, 2}


def test_after_neighbours_of_other_sizes_were_given_up_at_every_step(engine: FluxEngine, alone: bytes) -> None:
    """And with nobody else: what a dropped request has left behind is found by no later one."""
    for step in range(10):
        work = Work(engine, [replace(WATCHED, width=544, height=512 + 32 * step), replace(WATCHED, seeds=(step + 1,))])
        for _ in range(step):
            work.step_loop.run_once()
        work.cancel("0")
        work.cancel("1")
    assert draw(engine, WATCHED) == alone


@pytest.mark.long
def test_beside_a_neighbour_that_fails_in_company(
    engine: FluxEngine, alone: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its step: the others take theirs again without it, from where they were."""
    bad = replace(WATCHED, seeds=(13,))
    own = Sample.advance

    for step in (0, 4, 8):

        def fail(sample: Sample, *moved: torch.Tensor, step: int = step) -> None:
            if sample.request.seeds == bad.seeds and sample.step == step:
                raise RuntimeError("a bug")
            own(sample, *moved)

        monkeypatch.setattr(Sample, "advance", fail)
        work = Work(engine, [replace(WATCHED, seeds=(2,)), bad, replace(WATCHED, seeds=(3,))])
        work.admit("watched", WATCHED)
        assert work.picture() == alone
        while not work.step_loop.idle:
            work.step_loop.run_once()
        assert work.told.ends == {"0": "done", "1": "GenerationFailed", "2": "done", "watched": "done"}
