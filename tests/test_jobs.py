"""Jobs: accepted once, finished once, whoever leaves or dies; and idempotency on both roads."""

import base64
import io
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from support.jobs import KEYS, PREFER, call, ended, events_of, record
from support.ledgers import job_store, locked
from support.scripted_server import Gate, Scripted
from support.server import PROMPT, START_LIMIT, LiveServer, running
from support.strangers import Leaver

from server.jobs.models import SUCCEEDED
from server.schema import JobPage, JobReply

PATH = "/v1/images/generations"
BODY: dict[str, Any] = {
    "model": "flux/srpo", "prompt": "quick", "image_size": "square", "num_inference_steps": 6, "seed": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with Scripted(tmp_path_factory.mktemp("jobs"), safety_checker="none", api_keys=KEYS) as scripted:
            yield scripted


def post(server: Any, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return call(server, "POST", PATH, headers=headers or {}, json=BODY | fields)


def accept(server: Any, **fields: Any) -> dict[str, Any]:
    reply = post(server, PREFER, **fields)
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    JobReply.model_validate(job)
    assert reply.headers["location"] == job["poll_url"] == f"{server.url}/v1/jobs/{job['id']}"
    return job


def newest(server: Any) -> str | None:
    """The job that was accepted last."""
    jobs = call(server, "GET", "/v1/jobs?limit=1").json()["data"]
    identity: str | None = jobs[0]["id"] if jobs else None
    return identity


def lasting(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply without what another run of the same request may tell differently."""
    body = {name: value for name, value in reply.items() if name not in ("created", "timings", "images", "data")}
    return body | {"bytes": [httpx.get(item["url"]).content for item in reply["images"]]}


def test_a_job_holds_the_reply_of_the_plain_call(server: Scripted) -> None:
    job = accept(server, num_images=2)
    assert job["status"] in ("queued", "running")
    assert job["queue_position"] == 0
    done = ended(server, job["id"])
    assert done["status"] == "succeeded"
    plain = post(server, num_images=2)
    assert list(done["reply"]) == list(plain.json())
    assert lasting(done["reply"]) == lasting(plain.json())


def test_a_failed_job_holds_the_error(server: Scripted) -> None:
    done = ended(server, accept(server, prompt="oom")["id"])
    assert done["status"] == "failed"
    assert done["error"]["error"]["code"] == "out_of_memory"


def test_what_is_wrong_is_refused_and_not_accepted(server: Scripted) -> None:
    assert post(server, PREFER, num_inference_steps=99).status_code == 400
    assert post(server, {"idempotency-key": "x" * 256}).json()["error"]["param"] == "idempotency-key"
    assert call(server, "POST", PATH, key="no-such-key", json=BODY, headers=PREFER).status_code == 401


def test_the_line_is_told_and_a_cancelled_job_frees_its_place(server: Scripted, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    first, second, third = (accept(server, prompt=gate.prompt, seed=seed)["id"] for seed in (1, 2, 3))
    assert call(server, "GET", f"/v1/jobs/{third}").json()["queue_position"] == 1
    for _ in range(2):
        assert call(server, "DELETE", f"/v1/jobs/{second}").json()["status"] == "cancelled"
    assert call(server, "GET", f"/v1/jobs/{third}").json()["queue_position"] == 0
    assert call(server, "DELETE", f"/v1/jobs/{first}").json()["status"] == "cancelled"
    assert call(server, "DELETE", f"/v1/jobs/{third}").json()["error"]["error"]["code"] == "cancelled"
    gate.allow(100)
    server.until(lambda: server.pool.status().running == 0)


def test_a_finished_job_is_not_cancelled(server: Scripted) -> None:
    done = ended(server, accept(server)["id"])
    assert call(server, "DELETE", f"/v1/jobs/{done['id']}").json() == done


def test_events_go_on_after_the_last_one_that_was_read(server: Scripted) -> None:
    job = accept(server, num_images=2, partial_images=1)
    path = f"/v1/jobs/{job['id']}/events"
    whole = events_of(call(server, "GET", path))
    assert [name for _, name, _ in whole[-2:]] == ["image_generation.completed"] * 2
    done = ended(server, job["id"])
    assert [data["url"] for _, _, data in whole[-2:]] == [item["url"] for item in done["reply"]["images"]]
    rest = events_of(call(server, "GET", path, headers={"last-event-id": whole[-2][0]}))
    assert [identity for identity, _, _ in rest] == [whole[-1][0]]
    foreign = events_of(call(server, "GET", path, headers={"last-event-id": "ffffffff-9-99999999"}))
    assert [identity for identity, _, _ in foreign] == [identity for identity, _, _ in whole[-2:]]


def place_of(identity: str) -> tuple[int, ...]:
    """Where an event stands in its stream: its id without the server process that numbered it."""
    return tuple(map(int, identity.split("-")[1:]))


def test_a_second_reader_joins_in_the_middle(server: Scripted) -> None:
    job = accept(server, prompt="slow", num_inference_steps=50)
    path = f"/v1/jobs/{job['id']}/events"
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    with httpx.stream("GET", server.url + path, headers=headers, timeout=START_LIMIT) as reply:
        lines = reply.iter_lines()
        last = next(line.removeprefix("id: ") for line in lines if line.startswith("id: "))
    rest = events_of(call(server, "GET", path, headers={"last-event-id": last}))
    places = [place_of(identity) for identity, _, _ in rest]
    assert places == sorted(set(places))
    assert places[0] > place_of(last)
    assert rest[-1][1] == "image_generation.completed"


def test_jobs_are_their_keys_own(server: Scripted) -> None:
    job = accept(server)
    for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
        assert call(server, method, f"/v1/jobs/{job['id']}{path}", key=KEYS[1]).status_code == 404
    assert call(server, "GET", "/v1/jobs", key=KEYS[1]).json()["data"] == []
    assert call(server, "GET", "/v1/jobs/job_0").status_code == 404
    assert call(server, "GET", "/v1/jobs", key="wrong-key").status_code == 401


def test_the_list_pages_through_everything_once(server: Scripted) -> None:
    made = [accept(server, seed=seed)["id"] for seed in range(1, 6)]
    for identity in made:
        ended(server, identity)
    seen, query = [], "limit=2"
    while True:
        page = call(server, "GET", f"/v1/jobs?{query}").json()
        assert len(page["data"]) <= 2
        assert all("reply" not in job for job in page["data"])
        JobPage.model_validate(page)
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        query = f"limit=2&after={page['next_cursor']}"
    assert seen[:5] == made[::-1]
    assert len(seen) == len(set(seen))
    failed = call(server, "GET", "/v1/jobs?status=failed").json()["data"]
    assert {job["status"] for job in failed} <= {"failed"}
    assert call(server, "GET", "/v1/jobs?limit=0").json()["error"]["param"] == "limit"
    assert call(server, "GET", "/v1/jobs?status=odd").json()["error"]["param"] == "status"


# --- idempotency -----------------------------------------------------------------------------------------------------


def test_twenty_identical_posts_draw_once(server: Scripted) -> None:
    before = len(call(server, "GET", "/v1/jobs?limit=100").json()["data"])
    headers = {"idempotency-key": "twenty"}
    with ThreadPoolExecutor(20) as threads:
        replies = list(threads.map(lambda _: post(server, headers, seed=99), range(20)))
    assert {reply.status_code for reply in replies} == {201}
    assert len({reply.text for reply in replies}) == 1
    assert [reply.headers.get("idempotent-replayed") for reply in replies].count(None) == 1
    assert len(call(server, "GET", "/v1/jobs?limit=100").json()["data"]) == before + 1
    later = post(server, headers, seed=99)
    assert later.text == replies[0].text
    assert later.headers["x-aimlapi-credits-used"] == replies[0].headers["x-aimlapi-credits-used"]


def test_the_key_with_another_body_is_a_409_and_with_another_owner_another_job(server: Scripted) -> None:
    headers = {"idempotency-key": "one"}
    assert post(server, headers).status_code == 201
    refused = post(server, headers, seed=8)
    assert refused.status_code == 409
    assert refused.headers["x-should-retry"] == "false"
    other = call(server, "POST", PATH, key=KEYS[1], headers=headers, json=BODY | {"seed": 8})
    assert other.status_code == 201


def test_the_roads_share_their_keys(server: Scripted) -> None:
    headers = {"idempotency-key": "both"}
    plain = post(server, headers)
    job = post(server, headers | PREFER)
    assert job.status_code == 202
    assert job.json()["reply"] == plain.json()


def test_a_cancelled_or_passing_failure_frees_the_key(server: Scripted, tmp_path: Path) -> None:
    headers, gate = {"idempotency-key": "again"}, Gate(tmp_path / "gate")
    first = post(server, headers | PREFER, prompt=gate.prompt).json()
    call(server, "DELETE", f"/v1/jobs/{first['id']}")
    again = post(server, headers | PREFER, prompt=gate.prompt).json()
    assert again["id"] != first["id"]
    call(server, "DELETE", f"/v1/jobs/{again['id']}")
    gate.allow(100)


def test_a_lasting_failure_is_replayed(server: Scripted) -> None:
    headers = {"idempotency-key": "fails"}
    first, second = post(server, headers, prompt="oom"), post(server, headers, prompt="oom")
    assert (first.status_code, second.status_code) == (500, 500)
    assert second.headers["x-should-retry"] == "false"
    assert first.json()["error"] == second.json()["error"]
    for reply in (first, second):
        assert reply.json()["requestId"] == reply.headers["x-request-id"]
        assert reply.json()["path"] == reply.json()["instance"] == PATH


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_for_a_job_that_is_cancelled_is_told(server: Scripted, tmp_path: Path, stream: bool) -> None:
    before, gate = newest(server), Gate(tmp_path / "gate")
    with ThreadPoolExecutor(1) as threads:
        headers = {"idempotency-key": f"waits {stream}"}
        waiting = threads.submit(post, server, headers, stream=stream, prompt=gate.prompt)
        Scripted.until(lambda: newest(server) != before)
        call(server, "DELETE", f"/v1/jobs/{newest(server)}")
        reply = waiting.result()
    gate.allow(100)
    told = events_of(reply)[-1][2] if stream else reply.json()
    assert (told["statusCode"], told["error"]["code"]) == (409, "cancelled")
    assert told["requestId"] == reply.headers["x-request-id"]
    assert stream or (reply.status_code, reply.headers["x-should-retry"]) == (409, "false")


def test_a_client_that_leaves_finds_its_reply_under_its_key(server: Scripted, tmp_path: Path) -> None:
    before, gate = newest(server), Gate(tmp_path / "gate")
    headers = {"authorization": f"Bearer {KEYS[0]}", "idempotency-key": "left"}
    leaver = Leaver(server.url + PATH, BODY | {"prompt": gate.prompt}, headers)
    Scripted.until(lambda: newest(server) != before)
    leaver.leave()
    gate.allow(100)
    reply = post(server, {"idempotency-key": "left"}, prompt=gate.prompt)
    assert reply.status_code == 201
    assert reply.headers["idempotent-replayed"] == "true"


def test_a_stream_with_a_key_is_joined_and_replayed(server: Scripted, tmp_path: Path) -> None:
    """Whoever posts it again sees the same request: what is still to come of it, or its images."""
    headers, gate = {"authorization": f"Bearer {KEYS[0]}", "idempotency-key": "streamed"}, Gate(tmp_path / "gate")
    body = BODY | {"prompt": gate.prompt, "stream": True, "partial_images": 1, "seed": 70}
    before = len(call(server, "GET", "/v1/jobs?limit=100").json()["data"])
    with httpx.stream("POST", server.url + PATH, json=body, headers=headers, timeout=START_LIMIT) as left:
        lines = left.iter_lines()
        assert next(lines) == "event: image_generation.progress"
        with httpx.stream("POST", server.url + PATH, json=body, headers=headers, timeout=START_LIMIT) as joined:
            gate.allow(100)
            joined.read()
    assert joined.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert joined.headers["idempotent-replayed"] == "true"
    names = [name for _, name, _ in events_of(joined)]
    assert names.count("image_generation.partial_image") == 1
    assert names[-1] == "image_generation.completed"
    replayed = post(server, headers, **body)
    assert events_of(replayed) == events_of(joined)[-1:]
    shown = events_of(replayed)[0][2]
    assert httpx.get(shown["url"]).content == base64.b64decode(shown["b64_json"])
    assert replayed.headers["x-engine-fingerprint"] == joined.headers["x-engine-fingerprint"]
    assert replayed.headers["content-location"] == joined.headers["content-location"]
    assert events_of(call(server, "GET", httpx.URL(replayed.headers["content-location"]).path))[-1][2]["seed"] == 70
    assert len(call(server, "GET", "/v1/jobs?limit=100").json()["data"]) == before + 1
    assert post(server, headers, **body | {"seed": 71}).status_code == 409


@pytest.mark.parametrize("form", [{"sync_mode": True}, {"response_format": "b64_json"}, {}])
def test_openai_reads_a_stream_with_a_key_twice(server: Scripted, form: dict[str, Any]) -> None:
    own = {"image_size": "square", "num_inference_steps": 6, "seed": 7} | form
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0]) as client:
        twice = [
            list(
                client.images.generate(
                    model="flux/srpo",
                    prompt="quick",
                    stream=True,
                    extra_body=own,
                    extra_headers={"Idempotency-Key": f"openai {sorted(form)}"},
                )
            )
            for _ in range(2)
        ]
    assert [event.type for event in twice[0]] == ["image_generation.completed"]
    assert [event.b64_json for event in twice[0]] == [event.b64_json for event in twice[1]]


def test_a_stream_whose_request_failed_fails_again(server: Scripted) -> None:
    headers = {"idempotency-key": "failing stream"}
    replies = [post(server, headers, prompt="oom", stream=True) for _ in range(2)]
    first, second = (events_of(reply)[-1] for reply in replies)
    assert first[1] == second[1] == "error"
    assert first[2]["error"] == second[2]["error"]
    assert second[2]["error"]["code"] == "out_of_memory"
    assert [event[2]["requestId"] for event in (first, second)] == [reply.headers["x-request-id"] for reply in replies]


# --- the next start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("then", "noted"), [("f" * 32, False), ("e" * 32, True)])
def test_a_job_that_another_engine_finishes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, noted: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("SCRIPTED_FINGERPRINT", "f" * 32)
    gate = Gate(tmp_path / "gate")
    with Scripted(tmp_path) as server:
        job = accept(server, prompt=gate.prompt)["id"]
    monkeypatch.setenv("SCRIPTED_FINGERPRINT", then)
    gate.allow(100)
    with Scripted(tmp_path) as server:
        resumed = ended(server, job)["reply"]
        fresh = ended(server, accept(server)["id"])["reply"]
    notes = " ".join(resumed["timings"].get("notes", []))
    assert ("f" * 32 in notes and then in notes) is noted
    assert then not in str(fresh["timings"])


def test_what_waits_for_the_model_after_a_restart_is_cancelled_at_once_or_left_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    gate = Gate(tmp_path / "gate")
    with Scripted(tmp_path) as server:
        first, second, third = (accept(server, prompt=gate.prompt, seed=seed)["id"] for seed in (1, 2, 3))
    with Scripted(tmp_path, loading=True) as server:
        assert call(server, "DELETE", f"/v1/jobs/{third}").json()["status"] == "cancelled"
        assert {call(server, "GET", f"/v1/jobs/{job}").json()["status"] for job in (first, second)} == {"queued"}
    gate.allow(100)
    with Scripted(tmp_path) as server:
        assert {ended(server, job)["status"] for job in (first, second)} == {"succeeded"}
        assert ended(server, third)["status"] == "cancelled"


# --- the database and its command ------------------------------------------------------------------------------------


def test_an_expired_job_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with job_store(tmp_path) as store:
        store.add(record("job_old"))
        store.end("job_old", SUCCEEDED, 201, {}, "{}")
        store.sweep(expire=-1)
    with Scripted(tmp_path) as server:
        assert call(server, "GET", "/v1/jobs/job_old").status_code == 410
        assert call(server, "GET", "/v1/jobs").json()["data"] == []


def test_a_locked_database_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("server.database.sqlite.BUSY_TIMEOUT", 0.01)
    with Scripted(tmp_path) as server:
        with locked(tmp_path / "jobs.sqlite3"):
            refused = post(server, PREFER)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "storage_busy"
        assert refused.headers["retry-after"] == "5"
        server.until(lambda: server.pool.status().running == 0)  # what was not written down is not drawn
        accept(server)


def jobs_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "jobs", "--data-dir", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_LIMIT)


@pytest.mark.long
def test_the_command_lists_and_cancels_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    assert jobs_command(tmp_path).returncode == 2
    with Scripted(tmp_path) as server:
        hanging = accept(server, prompt="hang")["id"]
        listed = jobs_command(tmp_path, "--json")
        assert [json.loads(line)["state"] for line in listed.stdout.splitlines()] == ["unfinished"]
        assert "hang" not in listed.stdout
        assert f"{hanging}  unfinished  " in jobs_command(tmp_path).stdout
        assert jobs_command(tmp_path, "cancel", hanging).stdout == f"{hanging} cancelled\n"
        assert ended(server, hanging)["status"] == "cancelled"
        server.until(lambda: server.pool.status().running == 0)
        assert jobs_command(tmp_path, "cancel", hanging, "job_0").returncode == 1


# --- kill -9 ---------------------------------------------------------------------------------------------------------

WITH_PICTURE = "SELECT count(*) FROM jobs WHERE state = 'accepted' AND request LIKE '%image-to-image%'"
ACCEPTED, KILLS = (int(part) for part in os.environ.get("FAULTS", "8x2").split("x"))


def begun(seed: int) -> dict[str, Any]:
    """The request of this seed. Those of odd seeds begin at a picture; the first one takes seconds."""
    fields = {"prompt": PROMPT, "seed": seed, "num_inference_steps": seed % 4 + 1 if seed > 1 else 50}
    if seed % 2 == 0:
        return BODY | fields
    file = io.BytesIO()
    Image.frombytes("RGB", (512, 544), random.Random(seed).randbytes(512 * 544 * 3)).save(file, "PNG")
    link = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return BODY | fields | {"model": "flux/srpo/image-to-image", "image_url": link}


@pytest.mark.long
def test_every_accepted_job_finishes_once_with_the_same_bytes_whenever_the_server_is_killed(tmp_path: Path) -> None:
    """`make faults` does it with more jobs and more deaths."""
    chance = random.Random()
    accepted: dict[int, str] = {}  # seed -> job
    seeds = iter(range(1, 10_000))

    def ask(server: LiveServer, until: int) -> None:
        while len(accepted) < until:
            seed = next(seeds)
            try:
                reply = httpx.post(server.url + PATH, json=begun(seed), headers=PREFER, timeout=START_LIMIT)
            except httpx.TransportError:
                return  # killed in the middle: perhaps accepted, but not acknowledged
            assert reply.status_code == 202, reply.text
            accepted[seed] = reply.json()["id"]

    for death in range(1, KILLS + 1):
        with running(tmp_path, queue_size="1000") as server:
            goal = -(-ACCEPTED * death // KILLS)
            enough = chance.randint(len(accepted), goal) if death > 1 else 1
            asking = threading.Thread(target=ask, args=(server, goal))
            killing = threading.Timer(chance.uniform(0, 1.5) if death > 1 else 0, server.process.kill)
            asking.start()
            Scripted.until(lambda enough=enough: len(accepted) >= enough)
            killing.start()
            killing.join()
            asking.join()
            assert server.process.wait() == -9
            print(f"death {death}: {len(accepted)} accepted, by state {states(server.data_dir)}")
            pictures = count(server.data_dir, "SELECT count(*) FROM sources")
            assert pictures == count(server.data_dir, WITH_PICTURE)
            assert pictures or death > 1  # killed as soon as the first one was acknowledged
    started = time.monotonic()
    with running(tmp_path, queue_size="1000") as server:
        ask(server, ACCEPTED)
        done = {seed: ended(server, identity) for seed, identity in accepted.items()}
        print(f"{len(done)} finished {time.monotonic() - started:.1f} s after the last start")
        assert len(done) == ACCEPTED
        assert {job["status"] for job in done.values()} == {"succeeded"}
        for seed, job in done.items():
            plain = call(server, "POST", PATH, json=begun(seed)).json()["images"][0]["url"]
            assert httpx.get(rebased(job, server)).content == httpx.get(plain).content, seed
    assert states(server.data_dir).keys() == {SUCCEEDED}
    assert count(server.data_dir, "SELECT count(*) FROM sources") == 0


def count(folder: Path, query: str) -> int:
    with closing(sqlite3.connect(folder / "jobs.sqlite3")) as ledger:
        return int(ledger.execute(query).fetchone()[0])


def states(folder: Path) -> dict[str, int]:
    """How many jobs there are of each state, each job once."""
    with closing(sqlite3.connect(folder / "jobs.sqlite3")) as ledger:
        return dict(ledger.execute("SELECT state, count(DISTINCT id) FROM jobs GROUP BY state"))


def rebased(job: dict[str, Any], server: LiveServer) -> str:
    """The image's URL on the server as it is now: each life has another port."""
    return server.url + httpx.URL(job["reply"]["images"][0]["url"]).path
