"""Metrics: what a load generator counted is what they say, nobody's words are in them, and they answer whatever else
does not."""

import asyncio
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from support.canaries import talking
from support.jobs import PREFER, ended
from support.ledgers import opened
from support.nvml import FakeNvml
from support.scripted_server import Gate, Scripted
from support.server import LiveServer, free_port, running
from support.strangers import Leaver
from support.waiting import LIMIT, within

from pipelines.safety.guard import Guard
from pipelines.safety.open_nsfw import load_open_nsfw
from server.app import create_app
from server.error_table import TABLE
from server.errors import StorageBusy
from server.jobs.store import JobStore
from server.metrics.readings import CardReader
from server.metrics.recorder import Metrics
from server.metrics.table import CARD_FREE, CARD_SIZE, MEGAPIXELS, METRICS, size_class
from server.security.store import KeyStore
from server.settings.server import Settings

PATH = "/v1/images/generations"
BODY = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 2}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def scrape(server: Any, **options: Any) -> Samples:
    reply = httpx.get(f"{server.url}/metrics", timeout=LIMIT, **options)
    assert reply.status_code == 200
    return read(reply.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all samples with these labels."""
    return sum(found for (own, has), found in samples.items() if own == name and labels.items() <= dict(has).items())


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("server.api.metrics.PATIENCE", LIMIT)  # else a disk that is busy takes numbers away
    refused = tmp_path / "refused.txt"
    refused.write_text("forbidden\n")
    with Scripted(tmp_path / "data", queue_size=3, prompt_list=refused) as server:
        yield server


def post(server: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + PATH, json=BODY | fields, headers=headers, timeout=LIMIT)


# ---- The numbers


def test_the_numbers_are_those_that_a_load_generator_counted(scripted: Scripted) -> None:
    requests: list[dict[str, Any]] = [
        *({"num_images": count, "seed": count, "acceleration": "none"} for count in (1, 2, 3, 4)),
        *(
            {"image_size": "square_hd", "num_inference_steps": 28, "acceleration": preset}
            for preset in ("regular", "high")
        ),
        {"stream": True},
        *({"num_images": 9} for _ in range(3)),
        *({"prompt": "forbidden fruit"} for _ in range(2)),
        {"prompt": "raise"},
        {"prompt": "oom"},
    ]
    counted: Counter[int] = Counter()
    codes: Counter[str] = Counter()
    for request in requests:  # one after the other: the queue is short
        reply = post(scripted, **request)
        counted[reply.status_code] += 1
        codes[reply.json()["error"]["code"] if reply.is_error else ""] += 1
    job = post(scripted, PREFER, num_images=2, prompt="a durable cat").json()["id"]
    ended(scripted, job)
    samples = scrape(scripted)

    def requests_of(**labels: str) -> float:
        return value(samples, "srpo_http_requests_total", route=PATH, method="POST", **labels)

    assert counted == {201: 6, 200: 1, 400: 5, 500: 2}
    for status, count in counted.items():
        assert requests_of(status=str(status)) == count
    assert requests_of(status="202") == 1
    assert (
        requests_of(code="prompt_refused") == value(samples, "srpo_requests_refused_total") == codes["prompt_refused"]
    )
    assert requests_of(code="out_of_memory") == 1
    assert value(samples, "srpo_requests_admitted_total") == 6 + 1 + 2 + 1
    assert value(samples, "srpo_requests_finished_total", outcome="succeeded") == 8
    assert value(samples, "srpo_requests_finished_total", outcome="failed", code="generation_failed") == 1
    assert value(samples, "srpo_requests_finished_total") == 10
    assert value(samples, "srpo_images_total") == 1 + 2 + 3 + 4 + 2 + 1 + 2
    assert value(samples, "srpo_images_total", megapixels="1", acceleration="high") == 1
    assert value(samples, "srpo_image_pixels_total") == 13 * 512**2 + 2 * 1024**2
    assert value(samples, "srpo_images_checked_total") == 15
    assert value(samples, "srpo_images_checked_total", flagged="true") == 0
    assert value(samples, "srpo_e2e_request_latency_seconds_count") == 8
    assert value(samples, "srpo_request_queue_wait_seconds_count") == 8
    for stage in ("text", "denoise", "decode", "safety", "encode", "store"):
        assert value(samples, "srpo_request_stage_seconds_count", stage=stage) == 8
    assert value(samples, "srpo_denoise_steps_total", acceleration="regular", step="computed") == 15 + 2 + 4
    assert value(samples, "srpo_denoise_steps_total", acceleration="regular", step="skipped") == 28 - 15
    assert value(samples, "srpo_denoise_steps_total", acceleration="high", step="computed") == 10
    assert value(samples, "srpo_denoise_steps_total", acceleration="none") == 2 * (1 + 2 + 3 + 4)
    assert value(samples, "srpo_denoise_step_latency_seconds_count") == 20 + 6 + 28 + 28
    assert value(samples, "srpo_batch_size_count") == value(samples, "srpo_batch_size_sum") == 82
    assert value(samples, "srpo_jobs", state="succeeded") == 1
    assert value(samples, "srpo_store_bytes") == sum(
        file.stat().st_size for file in (scripted.app.parts.settings.data_dir / "images").rglob("*.*")
    )


def test_the_line_cancellations_and_refusals_are_counted(scripted: Scripted, tmp_path: Path) -> None:
    """One runs, three wait; the fifth is refused; the client of one leaves, and the job of another is cancelled."""
    gate = Gate(tmp_path / "gate")
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(post, scripted, prompt=gate.prompt)
        assert within(LIMIT, lambda: gate.begun == 1)
        leaver = Leaver(scripted.url + PATH, BODY)
        assert within(LIMIT, lambda: scripted.in_flight == 2)
        leaver.leave()
        assert within(LIMIT, lambda: scripted.in_flight == 1)
        waiting = [threads.submit(post, scripted) for _ in range(2)]
        job = post(scripted, PREFER).json()["id"]
        assert within(LIMIT, lambda: scripted.in_flight == 4)
        assert post(scripted).status_code == 429
        during = scrape(scripted)
        assert value(during, "srpo_num_requests_running") == 1
        assert value(during, "srpo_num_requests_waiting") == 3
        assert value(during, "srpo_requests_capacity") == 4
        assert value(during, "srpo_predicted_queue_seconds") > 0
        assert value(during, "srpo_jobs", state="accepted") == 1
        assert httpx.delete(f"{scripted.url}/v1/jobs/{job}").json()["status"] == "cancelled"
        gate.allow(2)
        assert {reply.result().status_code for reply in (first, *waiting)} == {201}
    assert within(LIMIT, lambda: value(scrape(scripted), "srpo_requests_finished_total") == 5)
    after = scrape(scripted)
    assert value(after, "srpo_requests_admitted_total") == 5
    assert value(after, "srpo_requests_finished_total", outcome="cancelled") == 2
    assert value(after, "srpo_requests_finished_total", outcome="succeeded") == 3
    assert value(after, "srpo_requests_refused_total", reason="queue_full") == 1
    assert value(after, "srpo_http_requests_total", status="499", code="cancelled") == 1
    assert value(after, "srpo_jobs", state="cancelled") == 1


def test_a_worker_that_dies_is_counted_and_its_request_once(scripted: Scripted, tmp_path: Path) -> None:
    assert post(scripted, prompt=f"die-once {tmp_path / 'marker'}").status_code == 201
    samples = scrape(scripted)
    assert value(samples, "srpo_worker_restarts_total", worker="0") == 1
    assert value(samples, "srpo_worker_load_seconds_count", cause="restart") == 1
    assert value(samples, "srpo_worker_state", state="ready") == value(samples, "srpo_ready") == 1
    assert value(samples, "srpo_requests_finished_total") == value(samples, "srpo_images_total") == 1
    assert value(samples, "srpo_worker_resident_memory_bytes") > 2**20


@pytest.mark.parametrize("action", ["black", "error"])
async def test_flagged_images_are_counted_whatever_becomes_of_them(tmp_path: Path, action: str) -> None:
    """The pool draws the checker's own canaries."""
    guard = Guard(load_open_nsfw(), 0.5, "client", action)
    async with talking(tmp_path, guard, (True, True)) as client:
        told = await client.post(PATH, json=BODY | {"num_images": 2})
        assert told.status_code == (201 if action == "black" else 400)
        samples = read((await client.get("/metrics")).text)
        assert value(samples, "srpo_images_checked_total", flagged="true") == 2
        assert value(samples, "srpo_images_checked_total") == 2
        assert value(samples, "srpo_images_total") == (2 if action == "black" else 0)
        code = "" if action == "black" else "content_policy_violation"
        assert value(samples, "srpo_requests_finished_total", code=code) == 1


def test_what_the_worker_counts_arrives_with_its_heartbeat(live: LiveServer) -> None:
    def hits() -> float:
        return value(scrape(live), "srpo_cache_hits_total", cache="text")

    live.generate(prompt="once and again")
    assert within(LIMIT, lambda: value(scrape(live), "srpo_cache_misses_total", cache="text") >= 1)
    before = hits()
    live.generate(prompt="once and again")
    assert within(LIMIT, lambda: hits() > before)


# ---- The page


def test_the_page_is_sound_in_both_formats(live: LiveServer) -> None:
    known = {metric.name.removesuffix("_total") for metric in METRICS}

    def whole_page(accept: str, parse: Callable[[str], Iterable[Metric]]) -> tuple[httpx.Response, list[str]]:
        """With the names on it. What takes too long on a busy machine is missing from a page, and on the next one."""
        pages: list[tuple[httpx.Response, list[str]]] = []

        def is_whole() -> bool:
            page = httpx.get(f"{live.url}/metrics", headers={"accept": accept})
            pages.append((page, [family.name for family in parse(page.text)]))
            return known <= set(pages[-1][1])

        assert within(LIMIT, is_whole), known - set(pages[-1][1])
        return pages[-1]

    live.generate()
    plain, families = whole_page("*/*", text_string_to_metric_families)
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert len(families) == len(set(families))
    assert {name for name in families if not name.startswith("process_")} == known
    open_metrics, names = whole_page("application/openmetrics-text; version=1.0.0", parse_openmetrics)
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert set(names) == set(families)
    if shutil.which("promtool"):
        checked = subprocess.run(["promtool", "check", "metrics"], input=plain.text, text=True, capture_output=True)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    assert "/metrics" not in httpx.get(f"{live.url}/openapi.json").json()["paths"]


def metrics_key(server: LiveServer) -> dict[str, str]:
    """The header of a key that may read the metrics of a server with keys."""
    with opened(server.data_dir) as database:
        _, key = KeyStore(database).add("prometheus", ("metrics",))
    headers = {"authorization": f"Bearer {key}"}
    assert within(LIMIT, lambda: httpx.get(f"{server.url}/metrics", headers=headers).status_code == 200)
    return headers


def test_nobodys_words_are_on_the_page_and_no_label_is_made_up_by_clients(live_with_key: LiveServer) -> None:
    secrets = ("sk-", "pomegranate", "secret-key-1", "wrong-key-9", "made-up-path", "quince", "BREW")
    headers, reader = {"authorization": "Bearer secret-key-1"}, metrics_key(live_with_key)
    with live_with_key.client(headers=headers) as client:
        assert client.post(PATH, json=BODY | {"prompt": "pomegranate"}).status_code == 201
        client.post(PATH, json=BODY | {"acceleration": "quince", "pomegranate": 1})
        client.get("/made-up-path")
        client.get("/files/made-up-path.png")
        client.get("/v1/models/made-up-path")
        client.request("BREW", "/v1/models")
        httpx.get(f"{live_with_key.url}/v1/jobs", headers={"authorization": "Bearer wrong-key-9"})
        page = client.get("/metrics", headers=reader).text
        assert not [secret for secret in secrets if secret in page]
        before = page.count("\n")
        for number in range(50):
            client.get(f"/made-up-path/{number}")
            client.request(f"BREW{number}", "/v1/models")
        assert client.get("/metrics", headers=reader).text.count("\n") - before < 50


def test_the_page_needs_a_key_where_there_are_keys(live_with_key: LiveServer) -> None:
    assert httpx.get(f"{live_with_key.url}/metrics").status_code == 401
    assert (
        httpx.get(f"{live_with_key.url}/metrics", headers={"authorization": "Bearer secret-key-1"}).status_code == 403
    )
    assert scrape(live_with_key, headers=metrics_key(live_with_key))


@pytest.mark.long
def test_a_port_of_its_own_needs_no_key_and_serves_nothing_else(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, api_keys="secret-key-1", metrics_port=str(port)) as server:
        own = f"http://127.0.0.1:{port}"
        assert value(read(httpx.get(f"{own}/metrics").text), "srpo_ready") == 1
        assert httpx.get(f"{own}/health").status_code == httpx.get(f"{own}/v1/models").status_code == 404
        assert httpx.post(own + PATH, json=BODY).status_code == 404
        assert httpx.get(f"{own}/metrics", headers={"host": "evil.example"}).status_code == 400
        headers = {"authorization": "Bearer secret-key-1"}
        assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 404
        with running(tmp_path / "second", "--metrics-port", str(port), wait=False) as second:
            assert second.process.wait(LIMIT) == 2
            assert "--metrics-port" in second.log.read_text()


def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    settings = Settings(metrics=False, data_dir=tmp_path, safety_checker="none", model="tiny")
    client = TestClient(create_app(settings), base_url="http://127.0.0.1")
    assert client.get("/health").status_code == 200
    assert client.get("/metrics").status_code == 404


def test_a_locked_database_takes_only_its_own_numbers_away(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: JobStore) -> dict[str, int]:
        raise StorageBusy

    names = {"srpo_jobs", "srpo_ready", "srpo_disk_free_bytes"}
    ended(scripted, post(scripted, PREFER).json()["id"])
    assert names <= {name for name, _ in scrape(scripted)}
    monkeypatch.setattr(JobStore, "count_by_state", refuse)  # who writes locks out no reader of SQLite
    samples = scrape(scripted)
    assert names & {name for name, _ in samples} == names - {"srpo_jobs"}
    assert value(samples, "srpo_ready") == 1


async def test_what_takes_too_long_is_left_out_and_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not answer: the page comes without it, and no second thread waits for it."""
    from threading import Event

    from server.api import metrics as page_module

    released, asked = Event(), []

    def hang(folder: Path) -> list[Any]:
        asked.append(folder)
        released.wait(LIMIT)
        return []

    monkeypatch.setattr(page_module, "read_disk", hang)
    monkeypatch.setattr(page_module, "PATIENCE", 0.05)
    app = create_app(Settings(data_dir=tmp_path, model="tiny"))
    try:
        page = app.metrics_page
        assert page is not None
        replies = await asyncio.gather(*(page.render("") for _ in range(3)))
        replies.append(await page.render(""))
        assert len(asked) == 1
        for reply in replies:
            samples = read(bytes(reply.body).decode())
            assert ("srpo_num_requests_running", frozenset()) in samples
            assert ("srpo_disk_free_bytes", frozenset()) not in samples
    finally:
        released.set()
        app.parts.threads.close()


# ---- The parts


def test_cards_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml([("A", 80, 60), ("B", 24, 1)], []))
    readings = {(reading.metric, reading.labels): reading.value for reading in CardReader().read()}
    assert readings == {
        (CARD_SIZE, ("0",)): 80, (CARD_FREE, ("0",)): 60, (CARD_SIZE, ("1",)): 24, (CARD_FREE, ("1",)): 1,
    }  # fmt: skip


def test_every_size_has_a_class() -> None:
    assert [size_class(side * side) for side in (512, 544, 1024, 1536)] == ["0.25", "0.5", "1", "2.25"]
    assert {float(size_class(width * height)) for width in range(512, 1537, 32) for height in range(512, 1537, 32)} == {
        *MEGAPIXELS
    }


def test_two_servers_in_one_process_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.count_connection(next(error() for error in TABLE if error.__name__ == "TooManyConnections"))
    pages = [{sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples
              if sample.labels.get("reason") == "too_many_connections"} for metrics in (first, second)]  # fmt: skip
    assert [page["srpo_requests_refused_total"] for page in pages] == [1, 0]


def test_names_follow_prometheus_rules() -> None:
    for metric in METRICS:
        assert metric.name.startswith("srpo_")
        assert metric.name.endswith("_total") is (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) is (metric.kind == "histogram"), metric.name
        assert metric.help.endswith("."), metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)
