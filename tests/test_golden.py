"""What a worker does before it is ready: it tries what can be batched, and draws pictures it has drawn before."""

import json
from pathlib import Path

import pytest
import torch
from support.engines import DTYPES, ask, tiny_engine

from pipelines.engine.base import EngineConfig
from pipelines.engine.flux import FluxEngine
from pipelines.engine.sample import Sample
from pipelines.errors import OutOfMemory
from pipelines.fields import Size
from pipelines.loading.build import load_engine
from pipelines.loading.golden import SelfCheckFailed, check_golden_images
from pipelines.optimize.batching import COUNTS, find_exact_batches
from pipelines.optimize.tuning_cache import TuningCache
from pipelines.workers.patience import Patience
from server.__main__ import main as srpo
from server.cli import selfcheck

SQUARE = Size(512, 512)


def flip_a_bit(engine: FluxEngine) -> None:
    """The lowest bit of the exponent of one weight: it doubles or halves."""
    weight = engine._transformer.proj_out.weight.detach().view(-1)
    bits = weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)
    bits[5] ^= 1 << (7 if weight.dtype == torch.bfloat16 else 23)


def attend_otherwise(engine: FluxEngine) -> None:
    """Another attention backend, that sums in another order."""
    engine._transformer.set_attention_backend("_native_math")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_engine_that_draws_as_before_passes_and_one_that_does_not_fails(dtype: torch.dtype, tmp_path: Path) -> None:
    kept = TuningCache(tmp_path / "engine.json")
    check_golden_images(tiny_engine(dtype), kept)
    check_golden_images(tiny_engine(dtype), kept)
    assert set(kept.section("golden")) == {tiny_engine(dtype).info.fingerprint}
    engine = tiny_engine(dtype)
    flip_a_bit(engine)  # after the fingerprint was taken: the engine says that it is the same
    with pytest.raises(SelfCheckFailed, match=r"exact and accelerated pictures differ .* srpo selfcheck --renew"):
        check_golden_images(engine, kept)


def test_another_attention_backend_is_found_out(tmp_path: Path) -> None:
    kept = TuningCache(tmp_path / "engine.json")
    check_golden_images(tiny_engine(torch.float32), kept)
    engine = tiny_engine(torch.float32)
    attend_otherwise(engine)
    with pytest.raises(SelfCheckFailed):
        check_golden_images(engine, kept)


def test_a_fault_in_skipped_steps_alone_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TuningCache(tmp_path / "engine.json")
    check_golden_images(tiny_engine(torch.float32), kept)
    monkeypatch.setattr("pipelines.engine.forward.Residuals.at", lambda self, time: self.tensors()[-1])
    with pytest.raises(SelfCheckFailed, match="the self-check's accelerated pictures differ"):
        check_golden_images(tiny_engine(torch.float32), kept)


@pytest.mark.long
def test_loading_checks_and_names_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same choices, same fingerprint, taken from the file the second time; other precision or sizes, another one."""

    def load(dtype: str = "bfloat16", sizes: tuple[str, ...] = ("512x512",)) -> FluxEngine:
        config = EngineConfig(device="cpu", dtype=dtype, tuning_cache=str(tmp_path / "engine.json"), batch_sizes=sizes)
        engine = load_engine(config, lambda stage, progress: None)
        assert isinstance(engine, FluxEngine)
        return engine

    first = load()
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.loading.build.find_exact_batches", lambda *_: pytest.fail("tried again"))
        assert load().info == first.info
        assert load().options.batches == first.options.batches
    others = {load(sizes=()).info.fingerprint, load("float32").info.fingerprint}
    assert len(others | {first.info.fingerprint}) == 3
    file = tmp_path / "engine.json"
    file.write_text(file.read_text().replace('"exact": "', '"exact": "0'))
    with pytest.raises(SelfCheckFailed, match="exact"):
        load()


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    file = tmp_path / "engine.json"
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"engine\.json"):
            TuningCache(file).remember("golden", "key", dict)


def test_the_first_finding_stays(tmp_path: Path) -> None:
    """Whoever finds it: two workers that start together end with one value."""
    one, other = TuningCache(tmp_path / "new" / "engine.json"), TuningCache(tmp_path / "new" / "engine.json")
    assert one.remember("a", "key", lambda: [other.remember("a", "key", lambda: 1), 2]) == 1
    assert one.remember("a", "other", lambda: 3) == 3
    assert json.loads(one.path.read_text()) == {"a": {"key": 1, "other": 3}}
    one.forget("a")
    assert other.section("a") == {}


def test_srpo_selfcheck_says_in_one_line_which_file_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selfcheck.logs, "configure", lambda _: None)
    file = tmp_path / "engine.json"
    file.write_text("{")
    for flags in ([], ["--renew"]):
        assert srpo(["selfcheck", "--data-dir", str(tmp_path), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"srpo selfcheck: {file} is not readable")
    file.unlink()
    file.mkdir()  # root may read the file of another user, but nobody a folder
    assert srpo(["selfcheck", "--data-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"srpo selfcheck: {file}: Is a directory\n"


def test_srpo_selfcheck_is_as_patient_as_the_server_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patiences = []

    class StoppedPool:
        def __init__(self, _: object) -> None: ...

        async def start(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(selfcheck.logs, "configure", lambda _: None)
    monkeypatch.setattr(selfcheck, "WorkerPool", StoppedPool)
    monkeypatch.setattr(selfcheck, "local_workers", lambda _, __, patience: patiences.append(patience))
    monkeypatch.setenv("SRPO_STEP_TIMEOUT", "1234")
    assert srpo(["selfcheck", "--data-dir", str(tmp_path), "--worker-timeout", "77"]) == 130
    assert patiences == [Patience(77, 1234)]
    assert capsys.readouterr().err == "srpo selfcheck: stopped\n"


@pytest.mark.long
def test_srpo_selfcheck_compares_refuses_and_begins_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the worker that serves, too: what cannot be loaded is a server that does not start."""
    flags = ["selfcheck", "--data-dir", str(tmp_path)]
    assert srpo(flags) == 0
    assert "the first pictures" in capfd.readouterr().out
    file = tmp_path / "engine.json"
    kept = json.loads(file.read_text())
    (fingerprint,) = kept["golden"]
    kept["golden"][fingerprint]["accelerated"] = "0" * 64
    file.write_text(json.dumps(kept))
    assert srpo(flags) == 1
    assert "accelerated pictures differ" in capfd.readouterr().err
    assert srpo([*flags, "--renew"]) == 0
    assert json.loads(file.read_text())["golden"][fingerprint]["accelerated"] != "0" * 64


# --- batches ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def engine(request: pytest.FixtureRequest) -> FluxEngine:
    return tiny_engine(request.param)


@pytest.mark.long
def test_only_numbers_of_samples_without_a_changed_bit_are_allowed(engine: FluxEngine) -> None:
    """Independently of how it was found out: with them allowed, every picture is the one drawn alone."""
    counts = tuple(find_exact_batches(engine, SQUARE))
    engine = engine.change(batches={SQUARE: counts})
    requests = [
        ask(steps=steps, seed=seed, guidance_scale=seed, acceleration=preset, prompt="x" * seed)
        for seed, (steps, preset) in enumerate(
            [(3, "none"), (9, "high"), (10, "high"), (9, "high"), (9, "regular"), (2, "none")], 1
        )
    ]
    alone = {}
    for request in requests:
        (sample,) = engine.prepare(request)
        while engine.steps_left(sample):
            engine.step([sample])
        alone[request] = engine.finish(sample).data
    samples = [engine.prepare(request)[0] for request in requests]
    together = []
    while pending := [sample for sample in samples if engine.steps_left(sample)]:
        company = engine.select_batch(pending)
        together.append(len(company))
        engine.step(company)
    assert {sample.request: engine.finish(sample).data for sample in samples} == alone
    if counts:
        assert max(together) == 4
        assert min(together) == 1


def test_a_changed_bit_forbids_the_batch(engine: FluxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In company that is computed one by one, since what a device computes together may be exact or not."""
    own, wrong = FluxEngine.step, list[int]()

    def round_otherwise(self: FluxEngine, samples: list[Sample]) -> None:
        for sample in samples:
            own(self, [sample])
        if len(samples) in wrong:
            velocity = samples[2].velocity
            assert velocity is not None
            samples[2].velocity = velocity.nextafter(torch.tensor(9.0, dtype=velocity.dtype))

    monkeypatch.setattr(FluxEngine, "step", round_otherwise)
    assert find_exact_batches(engine, Size(64, 64)) == [2, 4]
    wrong.append(4)
    assert find_exact_batches(engine, Size(64, 64)) == [2]


def test_company_is_of_one_size_one_kind_of_step_and_an_allowed_number() -> None:
    engine = tiny_engine(torch.bfloat16)
    fast, exact = ask(steps=12, acceleration="high", num_images=3), ask(num_images=3)
    samples = engine.prepare(fast) + engine.prepare(exact) + engine.prepare(ask(544, 512))
    assert engine.select_batch(samples) == samples[:1]
    engine = engine.change(batches={SQUARE: COUNTS})
    assert engine.select_batch(samples) == samples[:2]
    assert engine.select_batch(samples[3:]) == samples[3:5]
    assert engine.select_batch(samples[6:]) == samples[6:]
    while samples[0].computed[samples[0].step]:
        engine.step([samples[0]])
    assert engine.select_batch(samples) == samples[:1]  # the next step of the first is a skipped one
    assert [engine.batch_limit(request) for request in (fast, ask(544, 512))] == [4, 1]


@pytest.mark.long
def test_what_did_not_fit_together_goes_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass without memory for four, then for two: every sample still gets its own bytes."""
    engine = tiny_engine(torch.bfloat16)
    requests = [ask(steps=9, seed=seed, acceleration="high") for seed in range(1, 5)]
    alone = []
    for request in requests:
        (sample,) = engine.prepare(request)
        while engine.steps_left(sample):
            engine.step([sample])
        alone.append(engine.finish(sample).data)
    engine = engine.change(batches={SQUARE: COUNTS})
    head, sizes = engine._transformer.proj_out.forward, []

    def full(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        if len(hidden) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return head(hidden)

    monkeypatch.setattr(engine._transformer.proj_out, "forward", full)
    samples = [engine.prepare(request)[0] for request in requests]
    for most in (4, 2):
        assert len(engine.select_batch(samples)) == most
        with pytest.raises(torch.OutOfMemoryError) as caught:
            engine.step(engine.select_batch(samples))
        assert engine.failure(caught.value) == OutOfMemory.__name__
    while pending := [sample for sample in samples if engine.steps_left(sample)]:
        engine.step(engine.select_batch(pending))
    assert sizes[:3] == [4, 2, 1]
    assert max(sizes[2:]) == 1
    assert [engine.finish(sample).data for sample in samples] == alone
