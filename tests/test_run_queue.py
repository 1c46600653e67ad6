"""The order of work: the shortest first, nobody starved, and the predictions behind it. No torch, no clock."""

import random
from dataclasses import dataclass
from statistics import mean, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.queueing.cost_model import CostModel
from pipelines.queueing.run_queue import AGEING, RunQueue
from pipelines.request import ImageRequest, Timings

COSTS = st.lists(st.integers(1, 200), min_size=1, max_size=16)


@dataclass
class Work:
    """A job of `cost` steps, each a second of work."""

    name: str
    cost: int
    arrives: float = 0.0
    done: int = 0
    ended: float | None = None

    @property
    def latency(self) -> float:
        assert self.ended is not None
        return self.ended - self.arrives


def step(queue: RunQueue[Work]) -> Work:
    job = queue.peek()
    job.done += 1
    queue.advance(job.name, job.done / job.cost)
    if job.done == job.cost:
        queue.remove(job.name)
    return job


def simulate(jobs: list[Work], in_order: bool = False) -> list[Work]:
    """Run jobs as they arrive, with `RunQueue` or first come first served."""
    queue: RunQueue[Work] = RunQueue()
    now, waiting = 0.0, sorted(jobs, key=lambda job: job.arrives)
    while waiting or queue:
        if not queue:
            now = max(now, waiting[0].arrives)
        while waiting and waiting[0].arrives <= now and not (in_order and queue):
            job = waiting.pop(0)
            queue.add(job.name, job, job.cost)
        job, now = step(queue), now + 1
        if job.done == job.cost:
            job.ended = now
    return jobs


@given(COSTS)
def test_of_jobs_that_came_together_the_shortest_ends_first(costs: list[int]) -> None:
    jobs = simulate([Work(str(index), cost) for index, cost in enumerate(costs)])
    assert [job.cost for job in sorted(jobs, key=lambda job: job.latency)] == sorted(costs)


@given(COSTS, st.integers(0, 199))
def test_a_job_that_began_goes_on_unless_a_shorter_one_comes(costs: list[int], steps: int) -> None:
    queue: RunQueue[Work] = RunQueue()
    for index, cost in enumerate(costs):
        queue.add(str(index), Work(str(index), cost), cost)
    first = queue.peek()
    for _ in range(min(steps, first.cost - 1)):
        assert step(queue) is first
    shorter = Work("late", 1)
    left = first.cost - first.done
    queue.add("late", shorter, 1)
    assert queue.peek() is (shorter if left > 1 else first)


@given(st.integers(1, 60), st.integers(1, 8), st.randoms(use_true_random=False))
def test_a_large_job_is_not_starved_by_small_ones_without_end(
    cost: int, neighbours: int, chance: random.Random
) -> None:
    """Small jobs keep coming, `neighbours` of them always waiting: the large one still ends in bounded work."""
    queue: RunQueue[Work] = RunQueue()
    large = Work("large", cost)
    queue.add("large", large, cost)
    bound = cost + cost / AGEING + neighbours * cost  # its own work, what may overtake it, and what is there then
    worked, number = 0, 0
    while large.done < large.cost:
        while len(queue) <= neighbours:
            number += 1
            small = Work(str(number), chance.randint(1, cost))
            queue.add(small.name, small, small.cost)
        step(queue)
        worked += 1
        assert worked <= bound


@given(COSTS, st.data())
def test_a_dropped_job_takes_no_further_step_and_changes_nothing_else(costs: list[int], data: st.DataObject) -> None:
    queue: RunQueue[Work] = RunQueue()
    for index, cost in enumerate(costs):
        queue.add(str(index), Work(str(index), cost), cost)
    gone = data.draw(st.integers(0, len(costs) - 1))
    for _ in range(data.draw(st.integers(0, costs[gone] - 1))):
        step(queue)
    queue.remove(str(gone))
    queue.remove(str(gone))  # again: it may have finished a moment ago
    while queue:
        assert step(queue).name != str(gone)


def test_a_small_job_beside_a_large_one_takes_at_most_one_step_longer_than_alone() -> None:
    for arrives in range(0, 1500, 37):
        _, small = simulate([Work("large", 2000), Work("small", 8, arrives)])
        assert small.latency <= 8 + 1


@pytest.mark.parametrize("gap", [0.0, 60.0], ids=["burst", "poisson"])
def test_sixty_unlike_jobs_wait_less_than_first_come_first_served(gap: float) -> None:
    chance = random.Random(5)
    arrivals = [0.0]
    for _ in range(59):
        arrivals.append(arrivals[-1] + (chance.expovariate(1 / gap) if gap else 0.0))
    costs = [chance.choice([4, 8, 28, 28, 60, 200]) for _ in arrivals]

    def latencies(in_order: bool) -> list[float]:
        jobs = [Work(str(index), cost, arrivals[index]) for index, cost in enumerate(costs)]
        return [job.latency for job in simulate(jobs, in_order)]

    fair, first_come = latencies(in_order=False), latencies(in_order=True)
    assert mean(fair) < 0.75 * mean(first_come)
    assert quantiles(fair, n=2)[0] < 0.6 * quantiles(first_come, n=2)[0]


def ask(width: int = 512, height: int = 512, steps: int = 28, images: int = 1, preset: str = "none") -> ImageRequest:
    return ImageRequest("tiny", "a cat", width, height, steps, 4.5, tuple(range(1, images + 1)), preset)


def seconds(total: float) -> Timings:
    return Timings(text=0.1 * total, denoise=0.8 * total, decode=0.1 * total)


def test_cost_counts_pixels_images_and_computed_steps() -> None:
    assert ask(1024, 1024, steps=10, images=2).cost == 20
    assert ask(steps=28).cost > ask(steps=28, preset="regular").cost > ask(steps=28, preset="high").cost
    assert ask(steps=28, preset="high").cost == pytest.approx(ask(steps=10).cost, rel=0.05)


def test_seconds_come_from_what_was_measured_at_the_nearest_size() -> None:
    cost_model = CostModel()
    assert cost_model.estimate_seconds(ask()) > 0  # a guess
    cost_model.record_job(ask(512, 512, steps=10), seconds(1.0))
    cost_model.record_job(ask(1536, 1536, steps=10), seconds(20.0))
    assert cost_model.estimate_seconds(ask(512, 512, steps=20)) == pytest.approx(2.0)
    assert cost_model.estimate_seconds(ask(1536, 1536, steps=10, images=2)) == pytest.approx(40.0)
    assert cost_model.estimate_seconds(ask(512, 544, steps=10)) == pytest.approx(1.0 * 544 / 512)
    assert cost_model.estimate_seconds(ask(512, 512, steps=20), remaining_fraction=0.25) == pytest.approx(0.5)


def test_the_pace_follows_a_device_that_slows_down() -> None:
    cost_model = CostModel()
    for _ in range(40):
        cost_model.record_job(ask(), seconds(1.0))
    for _ in range(40):
        cost_model.record_job(ask(), seconds(3.0))
    assert cost_model.estimate_seconds(ask()) == pytest.approx(3.0, rel=0.01)
