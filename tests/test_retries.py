"""Real SDKs with their default retries at a server that is loading or full: what they are told is enough."""

import heapq
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
from support.scripted_server import Gate, Scripted

from pipelines.errors import NotReady
from pipelines.queueing.refusals import Refusals
from server.envelope import headers_of

FIELDS = {"image_size": "square", "num_inference_steps": 1, "enable_safety_checker": False}
RETRIES = openai.DEFAULT_MAX_RETRIES


@pytest.fixture(autouse=True)
def engines_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def draw(server: Scripted, prompt: str) -> str:
    """The address of a picture, asked for as the SDK asks by default."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        reply = client.images.generate(model="flux/srpo", prompt=prompt, extra_body=FIELDS)
    assert reply.data is not None
    return str(reply.data[0].url)


def test_a_call_made_while_the_server_loads_ends_in_a_picture(tmp_path: Path) -> None:
    with Scripted(tmp_path, safety_checker="none", loading=True) as server, ThreadPoolExecutor() as threads:
        drawing = threads.submit(draw, server, "quick")
        Scripted.until(lambda: server.statuses)
        assert server.statuses == [503]
        (tmp_path / "loaded").touch()
        assert drawing.result().endswith(".jpeg")
    assert server.statuses == [503] * (len(server.statuses) - 1) + [201]


def test_each_of_more_clients_than_the_queue_takes_gets_a_picture(tmp_path: Path) -> None:
    """One runs, one waits, and six are refused before the first step ends."""
    gate = Gate(tmp_path / "gate")
    with Scripted(tmp_path, queue_size=1, safety_checker="none") as server, ThreadPoolExecutor(8) as threads:
        drawing = [threads.submit(draw, server, gate.prompt) for _ in range(8)]
        Scripted.until(lambda: server.statuses.count(429) == 6)
        gate.allow(100)
        assert len({picture.result() for picture in drawing}) == 8
    assert server.statuses[:6] == [429] * 6
    assert server.statuses.count(201) == 8


@pytest.mark.parametrize(("places", "seconds", "clients"), [(2, 0.5, 24), (2, 5.0, 12), (1, 5.0, 12), (3, 1.0, 54)])
def test_whoever_obeys_is_served_within_the_default_retries(
    places: int, seconds: float, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All come at once, one request runs at a time and takes `seconds`; by a clock of its own."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("pipelines.queueing.refusals.time", SimpleNamespace(monotonic=lambda: clock.now))
    refusals = Refusals()
    arrivals = [(clock.now + number / 1000, RETRIES) for number in range(clients)]
    ends: list[float] = []
    while arrivals:
        clock.now, retries = heapq.heappop(arrivals)
        ends = [end for end in ends if end > clock.now]
        if len(ends) < places:
            ends.append(max([clock.now, *ends]) + seconds)
            continue
        assert retries, f"refused for the last time at {clock.now - 1000:.1f} s"
        wait = int(headers_of(refusals.error(max(ends) - clock.now, [], len(ends)))["retry-after-ms"]) / 1000
        heapq.heappush(arrivals, (clock.now + wait, retries - 1))


def test_promises_to_clients_that_do_not_come_back_have_a_limit() -> None:
    refusals = Refusals()
    told = [refusals.error(2.0, [], 2).retry_after for _ in range(1000)]
    assert max(told) <= 60


def test_no_advice_is_longer_than_clients_obey() -> None:
    assert headers_of(NotReady("reading", 0.1, 300.0))["retry-after-ms"] == "60000"
