"""How far the host runs ahead of the device, seen by the events that it records and waits for."""

import pytest
import torch
from support.device_events import EventLog
from support.engines import ask, tiny_engine
from support.events import Told

from pipelines.engine.device_queue import Pacer
from pipelines.engine.flux import FluxEngine
from pipelines.workers.step_loop import StepLoop

CARD = torch.device("cuda:0")


@pytest.fixture
def engine() -> FluxEngine:
    """An engine that believes that a card computes."""
    engine = tiny_engine(torch.float32)
    engine._pacer = Pacer(CARD)
    return engine


@pytest.mark.parametrize("acceleration", ["none", "high"])
def test_one_step_is_queued_while_the_one_before_is_computed(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch, acceleration: str
) -> None:
    log = EventLog(monkeypatch)
    samples = engine.prepare(ask(steps=12, acceleration=acceleration))
    assert log.ahead == 0  # the time of the text ends with the text
    ahead = []
    while engine.steps_left(samples[0]):
        engine.step(samples)
        ahead.append(log.ahead)
    assert ahead == [1] * 11 + [0]  # and that of the steps before decoding begins


def test_jobs_that_take_turns_never_queue_more(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(monkeypatch)
    long, short = engine.prepare(ask(steps=6)), engine.prepare(ask(steps=3))
    ahead = []
    while engine.steps_left(long[0]):
        for samples in (long, short):
            if engine.steps_left(samples[0]):
                engine.step(samples)
                ahead.append(log.ahead)
    assert ahead == [1, 1, 1, 1, 1, 0, 1, 1, 0]


def test_after_a_cancellation_one_step_is_left_on_the_device(
    engine: FluxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, told = EventLog(monkeypatch), Told()
    step_loop = StepLoop(engine, told)
    plan = {"count": 0, "side": 32}
    step_loop.handle({"op": "run", "job": "a", "request": ask(steps=20).to_json(), "previews": plan})
    for _ in range(7):
        step_loop.run_once()
    step_loop.handle({"op": "cancel", "job": "a"})
    assert step_loop.idle
    assert len(told.steps) == 7
    assert log.ahead == 1


def test_on_a_cpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(monkeypatch)
    engine = tiny_engine(torch.float32)
    samples = engine.prepare(ask(steps=1))
    engine.step(samples)
    assert not log.done
