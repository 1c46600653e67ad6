"""Turns between tenants: in the line, on the device, and on a whole server with two keys."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.jobs import KEYS, PREFER, call, ended
from support.scripted_server import Gate, Scripted

from pipelines.job import Job
from pipelines.queueing.run_queue import RunQueue
from pipelines.queueing.waiting_line import WaitingLine
from pipelines.request import GenerationParams

PATH = "/v1/images/generations"
SMALL = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1}
TENANTS = "ABC"


def waiting(tenant: str, steps: int = 1) -> Job:
    body = {"prompt": "x", "image_size": "square", "num_inference_steps": steps}
    return Job("", GenerationParams.model_validate(body).to_request("tiny"), 0.0, tenant=tenant)


def drain(line: WaitingLine) -> list[Job]:
    taken = []
    while line:
        job = line.heads()[0]
        line.take(job)
        taken.append(job)
    return taken


async def test_a_newcomer_is_next_in_a_line_of_anothers_requests() -> None:
    line = WaitingLine(lambda job: job.request.cost)
    crowd = [waiting("A", 50) for _ in range(60)]
    for job in crowd:
        line.append(job)
    line.take(crowd[0])
    late = waiting("B")
    line.append(late)
    assert line.heads()[0] is late
    assert next(iter(line)) is late
    assert drain(line) == [late, *crowd[1:]]


@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 50)), min_size=1, max_size=40))
async def test_the_line_is_foretold_and_each_tenants_own_order_is_kept(jobs: list[tuple[str, int]]) -> None:
    line = WaitingLine(lambda job: job.request.cost)
    came = [waiting(tenant, steps) for tenant, steps in jobs]
    for job in came:
        line.append(job)
    foretold = list(line)
    assert drain(line) == foretold
    for tenant in TENANTS:
        assert [job for job in foretold if job.tenant == tenant] == [job for job in came if job.tenant == tenant]


@given(st.randoms(use_true_random=False))
async def test_while_all_wait_no_tenant_gets_more_seconds_than_another_but_for_one_job(random: random.Random) -> None:
    line = WaitingLine(lambda job: job.request.cost)
    sizes = {tenant: random.randint(1, 50) for tenant in TENANTS}
    largest = max(waiting(tenant, steps).request.cost for tenant, steps in sizes.items())
    for tenant in TENANTS:
        for _ in range(60):
            line.append(waiting(tenant, sizes[tenant]))
    had = dict.fromkeys(TENANTS, 0.0)
    left = Counter(dict.fromkeys(TENANTS, 60))
    while all(left.values()):
        job = line.heads()[0]
        line.take(job)
        had[job.tenant] += job.request.cost
        left[job.tenant] -= 1
        assert max(had[tenant] for tenant in TENANTS) - min(had[tenant] for tenant in TENANTS) <= 2 * largest


async def test_what_is_cancelled_while_it_waits_costs_its_tenant_no_turn() -> None:
    line = WaitingLine(lambda job: job.request.cost)
    cancelled = [waiting("A", 50) for _ in range(10)]
    left = [waiting("B"), waiting("A"), waiting("B")]
    for job in (*cancelled, *left):
        line.append(job)
    for job in cancelled:
        line.remove(job)
    assert drain(line) == left


async def test_a_job_whose_worker_died_goes_before_all_and_lets_none_pass() -> None:
    line = WaitingLine(lambda job: job.request.cost)
    line.append(other := waiting("B"))
    line.put_again(again := waiting("A", 50))
    assert line.heads() == [again]
    assert drain(line) == [again, other]


class Device:
    """Works a second at a time on whatever the queue says; `costs` are seconds by name."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.queue: RunQueue[str] = RunQueue()
        self.costs = costs
        self.done: Counter[str] = Counter()

    def add(self, tenant: str, *names: str) -> None:
        for name in names:
            self.queue.add(name, name, self.costs[name], tenant)

    def work(self, seconds: int) -> list[str]:
        """The names that took each second, until nothing is left."""
        taken: list[str] = []
        while self.queue and len(taken) < seconds:
            name = self.queue.peek()
            taken.append(name)
            self.done[name] += 1
            self.queue.advance(name, self.done[name] / self.costs[name])
            if self.done[name] >= self.costs[name]:
                self.queue.remove(name)
        return taken


def test_a_small_job_of_another_tenant_takes_the_next_steps() -> None:
    large = [f"large {number}" for number in range(10)]
    device = Device(dict.fromkeys(large, 200.0) | {"small": 4.0})
    device.add("A", *large)
    assert set(device.work(50)) == {"large 0"}
    device.add("B", "small")
    assert device.work(4) == ["small"] * 4


def test_a_tenant_with_a_large_job_gets_half_of_the_time_beside_one_with_small_jobs_without_end() -> None:
    small = [f"small {number}" for number in range(1000)]
    device = Device(dict.fromkeys(small, 3.0) | {"large": 300.0})
    device.add("A", "large")
    for name in small:
        device.add("B", name)
        device.work(3)
        if "large" not in device.queue:
            break
    assert device.done.pop("large") == 300
    assert device.done.total() <= 300 + 2 * 3


def test_one_tenant_is_served_as_without_tenants() -> None:
    costs = {str(number): float(random.Random(number).randint(1, 30)) for number in range(12)}
    plain, named = Device(costs), Device(costs)
    plain.add("", *costs)
    named.add("A", *costs)
    assert plain.work(1000) == named.work(1000)


# --- a server with two keys -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        folder = tmp_path_factory.mktemp("fairness")
        with Scripted(folder, safety_checker="none", api_keys=KEYS, key_requests=61) as scripted:
            yield scripted


def post(server: Scripted, key: str, **fields: Any) -> httpx.Response:
    return call(server, "POST", PATH, key, json=SMALL | fields, headers=PREFER)


def status(server: Scripted, identity: str, key: str) -> str:
    state: str = call(server, "GET", f"/v1/jobs/{identity}", key).json()["status"]
    return state


def test_one_small_request_passes_sixty_of_another_key(server: Scripted, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    try:
        post(server, KEYS[0], prompt=gate.prompt)
        Scripted.until(lambda: gate.begun == 1)
        crowd = [post(server, KEYS[0], prompt=gate.prompt).json() for _ in range(60)]
        assert {job["status"] for job in crowd} == {"queued"}
        late = post(server, KEYS[1]).json()
        assert late["queue_position"] == 0
        gate.allow(1)
        Scripted.until(lambda: status(server, late["id"], KEYS[1]) == "succeeded")
        assert gate.begun <= 2
        assert "succeeded" not in [status(server, job["id"], KEYS[0]) for job in crowd]
    finally:
        gate.allow(1000)
    for job in crowd:
        ended(server, job["id"])


def test_a_key_may_have_so_many_unfinished_requests_and_another_key_still_gets_in(
    server: Scripted, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate")
    jobs = [post(server, KEYS[0], prompt=gate.prompt).json()["id"] for _ in range(61)]
    refused = post(server, KEYS[0])
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    synchronous = call(server, "POST", PATH, KEYS[0], json=SMALL)
    assert synchronous.status_code == 429
    assert post(server, KEYS[1]).status_code == 202
    for job in jobs:
        call(server, "DELETE", f"/v1/jobs/{job}")
    gate.allow(1000)
    again = post(server, KEYS[0]).json()["id"]
    ended(server, again)
