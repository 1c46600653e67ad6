"""A worker's turns in one process, without a device: who goes along, and whose failure is whose."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from support.events import Told
from support.scripted_engine import ScriptedEngine

from pipelines.child_process import DEVICE_LOST
from pipelines.job import PreviewPlan
from pipelines.request import GenerationParams, ImageRequest
from pipelines.workers.step_loop import StepLoop

SIZES = [(512, 512), (544, 512)]


def ask(prompt: str = "a cat", seed: int = 1, steps: int = 3, images: int = 1, size: int = 0) -> ImageRequest:
    seeds = tuple(range(seed, seed + images))
    return ImageRequest("scripted", prompt, *SIZES[size], steps, 4.5, seeds, "none")


def test_a_worker_is_told_nothing_about_the_safety_check() -> None:
    """The guard reads the body; the pixels are the same with and without."""
    bodies = ({"prompt": "a cat", "seed": 1, "enable_safety_checker": wanted} for wanted in (True, False))
    checked, unchecked = (GenerationParams.model_validate(body).to_request("tiny") for body in bodies)
    assert checked.to_json() == unchecked.to_json()


class Work:
    """A shift, its engine and what it told."""

    def __init__(self, limit: int, *requests: ImageRequest) -> None:
        self.engine, self.told = ScriptedEngine(limit), Told()
        self.exits: list[int] = []
        self.step_loop = StepLoop(self.engine, self.told, self.exits.append)
        for number, request in enumerate(requests):
            self.admit(str(number), request)

    def admit(self, name: str, request: ImageRequest, previews: PreviewPlan = PreviewPlan()) -> None:  # noqa: B008
        plan = {"count": previews.count, "side": previews.side}
        self.step_loop.handle({"op": "run", "job": name, "request": request.to_json(), "previews": plan})

    def finish(self) -> None:
        while not self.step_loop.idle:
            self.step_loop.run_once()


REQUESTS = st.builds(
    ask,
    prompt=st.sampled_from(["a cat", "a cat", "raise", "raise at 1", "oom", "crowd-oom"]),
    seed=st.integers(1, 200),
    steps=st.integers(2, 6),
    images=st.integers(1, 4),
    size=st.integers(0, 1),
)


@given(st.lists(REQUESTS, min_size=1, max_size=8), st.integers(1, 4))
@settings(deadline=None)
def test_every_job_ends_as_it_would_have_alone(requests: list[ImageRequest], limit: int) -> None:
    """Whoever else is in the pass: the good are drawn, in every step and picture, and the bad fail by themselves."""
    work = Work(limit, *requests)
    work.finish()
    for number, request in enumerate(requests):
        alone = Work(1, request)
        alone.finish()
        name = str(number)
        assert work.told.ends[name] == alone.told.ends["0"]
        drawn = {image: data for (job, image), data in work.told.pictures.items() if job == name}
        assert drawn == {image: data for (_, image), data in alone.told.pictures.items()}
        if work.told.ends[name] == "done":
            steps = sorted((image, step) for job, image, step in work.told.steps if job == name)
            images, total = len(request.seeds), request.num_inference_steps
            assert steps == [(image, step) for image in range(images) for step in range(1, total + 1)]
    assert not work.exits


@given(st.lists(REQUESTS, min_size=1, max_size=8), st.integers(1, 4))
@settings(deadline=None)
def test_what_is_left_of_a_job_never_grows_and_ends_at_nothing(requests: list[ImageRequest], limit: int) -> None:
    work = Work(limit, *requests)
    work.finish()
    for name, left in work.told.remaining_fractions.items():
        assert left == sorted(left, reverse=True)
        assert work.told.ends[name] != "done" or left[-1] == 0


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(1, 4), st.data())
@settings(deadline=None)
def test_a_cancelled_job_takes_no_further_step(images: list[int], limit: int, data: st.DataObject) -> None:
    """Whatever the turn at which it is cancelled, and whoever shares its passes."""
    work = Work(limit, *(ask(seed=10 * number + 1, images=count) for number, count in enumerate(images)))
    gone = data.draw(st.integers(0, len(images) - 1))
    for _ in range(data.draw(st.integers(0, 12))):
        if not work.step_loop.idle:
            work.step_loop.run_once()
    work.step_loop.handle({"op": "cancel", "job": str(gone)})
    before = len(work.engine.passes)
    work.finish()
    seeds = range(10 * gone + 1, 10 * gone + 5)
    assert not any(seed in seeds for batch in work.engine.passes[before:] for seed in batch)
    assert all(work.told.ends[str(number)] == "done" for number in range(len(images)) if number != gone)


def test_requests_of_one_size_share_their_steps_and_others_do_not() -> None:
    work = Work(4, ask(seed=1), ask(seed=2), ask(seed=3, size=1), ask(seed=4, steps=5))
    work.finish()
    assert work.engine.passes[:3] == [[1, 2, 4]] * 3
    assert sorted(work.engine.passes[3:]) == [[3]] * 3 + [[4]] * 2


def test_the_images_of_one_request_share_their_steps() -> None:
    work = Work(2, ask(seed=1, images=3))
    work.finish()
    assert work.engine.passes == [[1, 2]] * 3 + [[3]] * 3


def test_the_seconds_of_a_shared_pass_are_shared() -> None:
    work = Work(4, *(ask("slow", seed=seed) for seed in range(1, 5)))
    work.finish()
    seconds = [timings.denoise for timings in work.told.timings.values()]
    assert len(seconds) == 4
    assert len(set(seconds)) == 1


def test_a_lost_device_ends_the_process_whoever_finds_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for requests in ([ask("raise")], [ask("raise"), ask()]):
        work = Work(4, *requests)
        monkeypatch.setattr(work.engine, "failure", lambda error: None)
        work.step_loop.run_once()
        assert work.exits[0] == DEVICE_LOST


def test_the_log_of_a_shared_step_names_its_jobs_and_holds_nobodys_prompt() -> None:
    work = Work(4, ask("raise at 1"), ask("my secret wish"))
    with capture_logs() as entries:
        work.finish()
    assert [(entry["event"], entry["jobs"]) for entry in entries] == [
        ("batch_failed", ["0", "1"]),
        ("job_failed", ["0"]),
    ]
    assert all("RuntimeError: a bug" in entry["exception"] for entry in entries)
    assert "secret wish" not in str(entries)
    assert work.told.ends == {"0": "GenerationFailed", "1": "done"}
