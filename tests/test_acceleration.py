"""Which steps the presets compute, and that a skipped step's memory is its sample's own."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engines import DTYPES, ask, draw, tiny_engine

from pipelines.acceleration import PRESETS
from pipelines.engine.flux import FluxEngine
from pipelines.engine.forward import Residuals, forward
from pipelines.engine.sample import Sample

STEPS = st.integers(1, 200)
SPARSE = [name for name in PRESETS if name != "none"]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def engine(request: pytest.FixtureRequest) -> FluxEngine:
    return tiny_engine(request.param)


@pytest.mark.parametrize(
    ("preset", "computed"),
    [("none", [4, 8, 12, 28, 40, 50]), ("regular", [4, 8, 9, 15, 20, 24]), ("high", [4, 8, 8, 10, 12, 14])],
)
def test_the_stated_numbers_of_computed_steps(preset: str, computed: list[int]) -> None:
    assert [sum(PRESETS[preset](steps)) for steps in (4, 8, 12, 28, 40, 50)] == computed


@given(STEPS)
def test_a_mask_has_an_entry_a_step_and_computes_the_first_and_the_last(steps: int) -> None:
    for mask in PRESETS.values():
        assert len(mask(steps)) == steps
        assert all(mask(steps)[:3])
        assert mask(steps)[-1]


@given(STEPS)
def test_a_faster_preset_and_a_shorter_run_never_compute_more(steps: int) -> None:
    counts = [sum(mask(steps)) for mask in PRESETS.values()]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == steps
    assert all(sum(mask(steps)) <= sum(mask(steps + 1)) <= sum(mask(steps)) + 1 for mask in PRESETS.values())


@given(STEPS)
def test_after_the_leading_steps_the_gaps_are_even(steps: int) -> None:
    for mask in PRESETS.values():
        computed = [step for step, compute in enumerate(mask(steps)) if compute][2:]
        gaps = {later - earlier for earlier, later in pairwise(computed)}
        assert len(gaps) == 0 or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("preset", SPARSE)
@pytest.mark.parametrize("steps", [1, 8])
def test_short_runs_are_exact(engine: FluxEngine, preset: str, steps: int) -> None:
    fast, exact = draw(engine, ask(steps=steps, seed=3, acceleration=preset)), draw(engine, ask(steps=steps, seed=3))
    assert fast[0] == exact[0]


def test_the_split_forward_equals_the_models_own_bit_for_bit(engine: FluxEngine) -> None:
    sample = engine.prepare(ask(1440, 512, 12, acceleration="high"))[0]
    inputs: dict[str, Any] = {
        "hidden_states": sample.latents,
        "timestep": sample.timesteps[:1].to(sample.latents.dtype) / 1000,
        "guidance": sample.guidance,
        "pooled_projections": sample.text.pooled,
        "encoder_hidden_states": sample.text.states,
        "txt_ids": sample.text.ids,
        "img_ids": sample.image_ids,
    }
    split, _ = forward(engine._transformer, None, **inputs)
    assert torch.equal(split, engine._transformer(**inputs, return_dict=False)[0])


def test_a_skipped_step_runs_the_first_block_alone() -> None:
    engine = tiny_engine(torch.float32)
    runs = {"first": 0, "rest": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs[name] += 1

        return hook

    engine._transformer.transformer_blocks[0].register_forward_hook(count("first"))
    engine._transformer.single_transformer_blocks[0].register_forward_hook(count("rest"))
    draw(engine, ask(steps=28, acceleration="high"))
    assert runs == {"first": 28, "rest": 10}


def test_residuals_are_extrapolated_to_first_order_in_time() -> None:
    slope, start = torch.randn(1, 5, 3, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    residuals = Residuals()
    for time in (1000.0, 900.0, 750.0):
        residuals.add(time, start + slope * time)
    torch.testing.assert_close(residuals.at(600.0), start + slope * 600.0)


def test_a_preset_changes_the_picture_a_little() -> None:
    """More than not at all; another seed's picture is much further away."""
    engine = tiny_engine(torch.bfloat16)

    def pixels(preset: str, seed: int) -> torch.Tensor:
        data = draw(engine, ask(steps=16, seed=seed, acceleration=preset))[0]
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).float()

    exact = pixels("none", seed=3)
    regular, high, other = (
        (pixels(preset, seed) - exact).square().mean() for preset, seed in [("regular", 3), ("high", 3), ("none", 4)]
    )
    assert 0 < regular < other / 2
    assert 0 < high < other / 2


@pytest.mark.long
def test_interleaved_and_aborted_samples_leave_their_neighbours_bytes_alone() -> None:
    """Three accelerated samples, of which one has another size, take turns while others start and are dropped."""
    engine = tiny_engine(torch.bfloat16)
    requests = [
        ask(512, 512, 12, seed=5, acceleration="high"),
        ask(512, 512, 14, seed=6, acceleration="regular"),
        ask(544, 672, 11, seed=7, acceleration="high"),
    ]
    alone = [draw(engine, request)[0] for request in requests]
    samples: list[Sample] = [engine.prepare(request)[0] for request in requests]
    turn = 0
    while pending := [sample for sample in samples if engine.steps_left(sample)]:
        dropped = engine.prepare(ask(512, 544, 12, seed=turn + 1, acceleration="high"))[0]
        for _ in range(turn % 12):  # dropped after every number of steps there is
            engine.step([dropped])
        for sample in pending if turn % 2 else reversed(pending):
            engine.step([sample])
        turn += 1
    assert [engine.finish(sample).data for sample in samples] == alone
