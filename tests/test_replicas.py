"""Servers that share a database: any of them answers for a job, and none is lost with the server or the database.

`make replicas` does it with real processes behind a real nginx, and kills them.
"""

import copy
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from PIL import Image
from structlog.testing import capture_logs
from support.buckets import S3Service
from support.jobs import KEYS, PREFER, call, ended, events_of, record
from support.ledgers import job_store, opened
from support.postgres import PASSWORD, Postgres
from support.scripted_server import Gate, Scripted
from support.server import START_LIMIT
from support.waiting import within

from server.jobs.leases import JobLeases
from server.jobs.models import JobRecord
from server.jobs.store import JobStore
from server.settings.server import Settings

PATH = "/v1/images/generations"
BODY: dict[str, Any] = {"model": "flux/srpo", "image_size": "square", "num_inference_steps": 3, "seed": 7}
Replicas = Callable[..., list[Scripted]]


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create_database()


@pytest.fixture
def address(url: str) -> str:
    """The database's, as the settings have it."""
    settings = Settings.model_validate({"database_url": url})
    return str(settings.database_url and settings.database_url.get_secret_value())


@pytest.fixture
def replicas(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    """Starts servers over one database. By default a lease lasts: a server that is late is not taken for gone."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with ExitStack() as stack:

        def start(count: int, **options: Any) -> list[Scripted]:
            common = {"api_keys": KEYS, "safety_checker": "none", "database_url": url, "lease": 600.0, **options}
            return [stack.enter_context(Scripted(tmp_path / f"replica-{number}", **common)) for number in range(count)]

        yield start


def post(server: Scripted, headers: dict[str, str], **fields: Any) -> httpx.Response:
    return call(server, "POST", PATH, headers=headers, json=BODY | fields)


def accept(server: Scripted, **fields: Any) -> str:
    reply = post(server, PREFER, **fields)
    assert reply.status_code == 202, reply.text
    identity: str = reply.json()["id"]
    return identity


def test_a_key_is_drawn_once_whichever_servers_it_is_posted_to(replicas: Replicas) -> None:
    servers = replicas(2)
    headers = {"idempotency-key": "one"}
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda number: post(servers[number % 2], headers, prompt="slow"), range(8)))
    assert {reply.status_code for reply in replies} == {201}
    assert len({reply.text for reply in replies}) == 1
    assert [reply.headers.get("idempotent-replayed") for reply in replies].count(None) == 1
    assert post(servers[1], headers, prompt="another").status_code == 409
    assert len(call(servers[0], "GET", "/v1/jobs").json()["data"]) == 1


def test_any_server_tells_of_a_job_and_cancels_it(replicas: Replicas) -> None:
    here, there = replicas(2)

    def status(identity: str) -> str:
        shown: str = call(there, "GET", f"/v1/jobs/{identity}").json()["status"]
        return shown

    running, waiting = accept(here, prompt="slow", num_inference_steps=50), accept(here, prompt="quick")
    assert within(START_LIMIT, lambda: status(running) == "running")
    assert call(there, "GET", f"/v1/jobs/{running}").json()["progress"]["steps"] == 50
    assert status(waiting) == "queued"
    assert call(there, "DELETE", f"/v1/jobs/{running}").json()["status"] == "cancelled"
    assert ended(here, running)["status"] == "cancelled"
    assert ended(there, waiting)["status"] == "succeeded"  # what was cancelled holds up nothing


def test_events_can_be_read_from_any_server(replicas: Replicas, tmp_path: Path) -> None:
    here, there = replicas(2)
    gate = Gate(tmp_path / "gate")
    gate.allow(2)
    identity = accept(here, prompt=gate.prompt)
    path, headers = f"/v1/jobs/{identity}/events", {"authorization": f"Bearer {KEYS[0]}"}
    with httpx.stream("GET", there.url + path, headers=headers, timeout=START_LIMIT) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("event: "))
        assert next(lines) == "event: image_generation.progress"
        gate.allow(3)
        assert list(lines)[-1] == "event: image_generation.completed"
    images = [events_of(call(server, "GET", path))[-1][2]["url"] for server in (here, there)]
    assert images[0] == images[1]


@pytest.mark.parametrize("links", ["proxied", "signed"])
def test_images_in_a_bucket_can_be_read_from_any_server(replicas: Replicas, s3: S3Service, links: str) -> None:
    store = {"store_url": s3.create_bucket(), "store_endpoint": s3.endpoint, "store_links": links}
    here, there = replicas(2, **store)
    (item,) = post(here, {}, prompt="quick").json()["images"]
    path = httpx.URL(item["url"]).path
    drawn = [httpx.get(server.url + path, follow_redirects=True) for server in (here, there)]
    assert drawn[0].content == drawn[1].content
    assert drawn[1].headers["content-type"] == item["content_type"]
    with Image.open(io.BytesIO(drawn[1].content)) as image:
        assert image.size == (item["width"], item["height"])
    part = httpx.get(there.url + path, headers={"range": "bytes=5-9"}, follow_redirects=True)
    assert (part.status_code, part.content) == (206, drawn[0].content[5:10])
    assert httpx.head(there.url + path, follow_redirects=True).status_code == 200
    assert httpx.get(f"{there.url}/files/{'A' * 32}.png").status_code == 404
    policy = httpx.get(f"{there.url}/").headers["content-security-policy"]
    assert (s3.endpoint in policy) is (links == "signed")  # else the playground could not show them
    s3.age(store["store_url"], f"images/{path[7:9]}/{path[7:]}", 90_000)
    assert [httpx.get(server.url + path).status_code for server in (here, there)] == [410, 410]


def leave_jobs(url: str, like: str, names: list[str], lease: float = 0.0) -> str:
    """Jobs that a server accepted which is gone, and has not renewed its lease. Returns its name."""
    with opened(url) as database, job_store(url) as store:
        gone = JobLeases(database, lease)
        done = store.find(like)
        assert done is not None
        for name in names:
            job = record(name)
            job.owner, job.request = done.owner, done.request
            gone.grant(job)
            store.add(job)
        return gone.replica


def test_the_jobs_of_a_server_that_is_gone_are_taken_over(replicas: Replicas, address: str) -> None:
    here, there = replicas(2)
    made = accept(here, prompt="quick")
    ended(here, made)
    names = [f"job_{number}" for number in range(6)]
    leave_jobs(address, made, names)
    assert [ended(there, name)["status"] for name in names] == ["succeeded"] * 6
    with job_store(address) as store:
        assert [getattr(store.find(name), "attempt", None) for name in names] == [1] * 6


def test_a_server_that_sleeps_wakes_for_the_jobs_of_one_that_is_gone(replicas: Replicas, address: str) -> None:
    (server,) = replicas(1, api_keys=())
    made = accept(server, prompt="quick")
    ended(server, made)
    assert call(server, "POST", "/v1/admin/sleep").json()["state"] == "asleep"
    leave_jobs(address, made, ["job_0"])
    assert ended(server, "job_0")["status"] == "succeeded"


def test_a_server_that_stops_hands_its_jobs_over_at_once(replicas: Replicas, tmp_path: Path, url: str) -> None:
    (stays,) = replicas(1)
    gate = Gate(tmp_path / "gate")
    options: dict[str, Any] = {"api_keys": KEYS, "safety_checker": "none", "database_url": url, "lease": 600.0}
    with Scripted(tmp_path / "stops", **options) as stops:
        identity = accept(stops, prompt=gate.prompt)
    gate.allow(100)
    assert ended(stays, identity)["status"] == "succeeded"


def test_nothing_accepted_is_lost_with_the_database(replicas: Replicas, postgres: Postgres, tmp_path: Path) -> None:
    (server,) = replicas(1, lease=2.0)
    gate = Gate(tmp_path / "gate")
    running = accept(server, prompt=gate.prompt)
    waiting = accept(server, prompt="quick")
    postgres.kill()
    try:
        refused = post(server, PREFER, prompt="quick")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert call(server, "GET", "/v1/jobs/job_0").status_code == 503
        assert within(START_LIMIT, lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert "database cannot be reached" in httpx.get(f"{server.url}/ready").json()["reason"]
        gate.allow(3)
        assert post(server, {}, prompt="quick").status_code == 201  # it needs no database
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert PASSWORD not in httpx.get(f"{server.url}/health").text
    finally:
        postgres.start()
    for identity in (running, waiting):
        assert ended(server, identity)["status"] == "succeeded"
    assert within(START_LIMIT, lambda: httpx.get(f"{server.url}/ready").status_code == 200)


def test_an_idle_server_is_not_ready_for_as_long_as_its_database_is_away(
    replicas: Replicas, postgres: Postgres
) -> None:
    """Between two tries to take over jobs nothing else asked it, and a load balancer's probes saw a ready server."""
    (server,) = replicas(1, lease=600.0)
    postgres.kill()
    try:
        assert within(START_LIMIT, lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        for _ in range(30):
            assert httpx.get(f"{server.url}/ready").status_code == 503
            time.sleep(0.1)
    finally:
        postgres.start()
    assert within(START_LIMIT, lambda: httpx.get(f"{server.url}/ready").status_code == 200)


def test_what_a_newer_server_writes_is_read_by_an_older_one(replicas: Replicas, address: str) -> None:
    """As while servers are replaced one after the other, when a job's request and progress have more fields."""
    (server,) = replicas(1)
    made = accept(server, prompt="quick")
    ended(server, made)
    with job_store(address) as store, opened(address) as database:
        newer, done = JobLeases(database, 600.0), store.find(made)
        assert done is not None
        assert done.request is not None
        job = record("newer")
        spoken = done.request["spoken"] | {"newer": [1]}
        spoken["native"] |= {"newer": 1}
        job.owner, job.request = done.owner, done.request | {"spoken": spoken, "newer": {}}
        newer.grant(job)
        store.add(job)
        newer.tell({"newer": {"stage": "denoise", "step": 2, "steps": 3, "newer": 1}})
        page = call(server, "GET", "/v1/jobs")
        assert page.status_code == 200
        assert page.json()["data"][0]["progress"]["step"] == 2
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        with httpx.stream("GET", f"{server.url}/v1/jobs/newer/events", headers=headers, timeout=START_LIMIT) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("event: "))
            assert next(lines) == "event: image_generation.progress"
            newer.release()
            assert list(lines)[-1] == "event: image_generation.completed"
    assert ended(server, "newer")["status"] == "succeeded"


@pytest.mark.parametrize("change", [{"model": "another/model"}, {"num_inference_steps": 10**6}])
def test_jobs_of_another_model_are_shown_as_they_were(replicas: Replicas, address: str, change: dict[str, Any]) -> None:
    """After the model was replaced by one with other bounds, they made the list of all jobs a 400."""
    (server,) = replicas(1)
    made = accept(server, prompt="quick", num_images=2)
    ended(server, made)
    with opened(address) as database:
        other = JobLeases(database, 600.0)
        other.replica = leave_jobs(address, made, ["running"], lease=600.0)
        with database.transaction() as session:
            for job in session.scalars(sa.select(JobRecord)):
                request = copy.deepcopy(job.request)
                assert request is not None
                request["spoken"]["native"] |= change
                job.request = request
        other.tell({"running": {"stage": "text"}})
        shown = call(server, "GET", "/v1/jobs").json()["data"]
        assert [job["status"] for job in shown] == ["running", "succeeded"]
        assert shown[0]["progress"]["num_images"] == 2
        told = events_of(call(server, "GET", f"/v1/jobs/{made}/events"))
        assert [(name, data["image_index"]) for _, name, data in told] == [
            ("image_generation.completed", 0),
            ("image_generation.completed", 1),
        ]
        other.release()
        failed = ended(server, "running")
        assert (failed["status"], failed["error"]["statusCode"]) == ("failed", 400)


def test_a_job_that_was_taken_over_just_before_is_cancelled_too(
    replicas: Replicas, tmp_path: Path, address: str
) -> None:
    """This server did not know yet that it was another's, and left it to be drawn."""
    (server,) = replicas(1)
    gate = Gate(tmp_path / "gate")
    identity = accept(server, prompt=gate.prompt)
    taken = "UPDATE jobs SET attempt = attempt + 1, replica = 'another', lease_until = lease_until + 600"
    with opened(address) as database, database.transaction() as session:
        session.execute(sa.text(taken))
    assert call(server, "DELETE", f"/v1/jobs/{identity}").json()["status"] == "cancelled"
    assert within(START_LIMIT, lambda: server.in_flight == 0)


FAIL = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'x' USING ERRCODE = 'query_canceled'; END $$;
CREATE TRIGGER fail BEFORE UPDATE ON jobs FOR EACH ROW WHEN (NEW.state = 'expired') EXECUTE FUNCTION fail();
UPDATE jobs SET finished = 1 WHERE id = 'old';
"""


def test_a_sweep_that_fails_keeps_no_server_from_its_work(
    tmp_path: Path, replicas: Replicas, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed before leases were renewed, and made every server unready."""
    monkeypatch.setattr("server.jobs.upkeep.SWEEP_INTERVAL", 0.01)
    gate = Gate(tmp_path / "gate")
    with capture_logs() as entries, opened(address) as database:
        (server,) = replicas(1, lease=2.0)
        identity = accept(server, prompt=gate.prompt)
        store = JobStore(database)
        store.add(record("old"))
        store.end("old", "failed", 500, {}, "{}")
        with database.transaction() as session:
            session.execute(sa.text(FAIL))
        assert within(START_LIMIT, lambda: "jobs_not_swept" in [entry["event"] for entry in entries])
        leases: set[float | None] = set()
        while len(leases) < 3:
            found = store.find(identity)
            assert found is not None
            leases.add(found.lease_until)
            assert httpx.get(f"{server.url}/ready").status_code == 200
        gate.allow(3)
        assert ended(server, identity)["status"] == "succeeded"
