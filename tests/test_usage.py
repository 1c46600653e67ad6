"""Usage: what clients were told adds up, over kills too; quotas hold for any number of requests at a time."""

import asyncio
import csv
import io
import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError
from support.jobs import PREFER, call, ended
from support.ledgers import locked, opened
from support.postgres import Postgres
from support.scripted_process import scripted_process
from support.scripted_server import Gate, Scripted
from support.server import START_LIMIT
from support.waiting import within

from server.__main__ import main as srpo
from server.database.database import Database
from server.errors import QuotaSpent
from server.process.threads import ThreadPools
from server.security.store import KeyStore
from server.usage.ledger import Reservation, UsageEntry, UsageLedger, day_of
from server.usage.writer import UsageWriter

PATH = "/v1/images/generations"
BODY = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1}
DAY = "2026-11-26"
NOON = 1795694400.0  # of that day


class Server:
    """With an administrator, who can ask what was used."""

    def __init__(self, scripted: Scripted, folder: Path, admin: str) -> None:
        self.scripted = scripted
        self.folder = folder
        self._admin = admin

    def add(self, **fields: Any) -> tuple[str, str]:
        """The id and the text of a new key."""
        made = call(self.scripted, "POST", "/v1/admin/keys", self._admin, json=fields).json()
        return made["id"], made["key"]

    def post(self, key: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return call(self.scripted, "POST", PATH, key, json=BODY | fields, headers=headers or {})

    def usage(self, identity: str, **query: str) -> Any:
        return call(self.scripted, "GET", "/v1/admin/usage", self._admin, params={"key": identity} | query)

    def row(self, identity: str) -> dict[str, Any]:
        """The key's only row."""
        (row,) = self.usage(identity).json()["data"]
        found: dict[str, Any] = row
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("usage")
    with opened(folder) as database:
        _, admin = KeyStore(database).add("root", ("admin", "metrics"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setattr("server.usage.writer.PATIENCE", START_LIMIT)  # else a disk that is busy lets replies go before
        with Scripted(folder, safety_checker="none", api_keys=("settings-key",)) as scripted:
            yield Server(scripted, folder, admin)


def test_usage_is_the_sum_of_what_replies_told(server: Server) -> None:
    identity, key = server.add(name="alice")
    plain = server.post(key, num_images=3)
    stream = server.post(key, stream=True)
    job = server.post(key, {"idempotency-key": "one"}, image_size="square_hd")
    again = server.post(key, {"idempotency-key": "one"}, image_size="square_hd")
    assert (plain.status_code, stream.status_code, job.status_code) == (201, 200, 201)
    assert again.headers["idempotent-replayed"] == "true"
    for prompt in ("raise", "oom"):
        assert server.post(key, prompt=prompt).status_code == 500
    row = server.row(identity)
    assert (row["name"], row["requests"], row["images"]) == ("alice", 3, 5)
    assert row["megapixels"] == 4 * 0.25 + 1
    assert row["credits"] == sum(reply.json()["meta"]["usage"]["credits_used"] for reply in (plain, job)) + 52500
    assert row["usd"] == row["credits"] / 2_000_000
    told = [reply.json()["timings"] for reply in (plain, job)]
    assert row["device_seconds"] >= sum(part[name] for part in told for name in ("text", "denoise", "decode")) - 0.001
    page = call(server.scripted, "GET", "/metrics", server._admin).text
    counted = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("key") == identity and sample.name.endswith("_total")
    }
    assert counted.pop("srpo_key_device_seconds_total") == pytest.approx(row["device_seconds"], abs=0.001)
    values = {"requests": 3, "images": 5, "image_pixels": 2 * 2**20, "credits": row["credits"]}
    assert counted == {f"srpo_key_{name}_total": value for name, value in values.items()}
    assert key not in page


def test_usage_is_shown_as_json_csv_and_a_table(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    identity, key = server.add(name='=HYPERLINK("x"), quoted')
    assert server.post(key).status_code == 201
    assert server.post("settings-key").status_code == 201
    (row,) = csv.DictReader(io.StringIO(server.usage(identity, format="csv").text))
    assert row["name"] == '\'=HYPERLINK("x"), quoted'
    assert (row["key"], row["images"]) == (identity, "1")
    assert server.usage(identity, until="2020-01-01").json()["data"] == []
    refused = server.usage(identity, since="yesterday")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "since")
    refused = server.usage(identity, since="2026-02-02", until="2026-01-01")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "until")
    assert call(server.scripted, "GET", "/v1/admin/usage", key).status_code == 403
    where = ["--data-dir", str(server.folder)]
    assert srpo(["usage", *where, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {"sha256:", "key_"} <= {row["key"][: row["key"].find("_") + 1] or row["key"][:7] for row in rows}
    for shown in (identity, next(row["key"] for row in rows if row["key"].startswith("sha256:"))):
        assert srpo(["usage", *where, "--key", shown]) == 0
        assert shown in capsys.readouterr().out
    assert srpo(["usage", *where, "--key", "nosuch"]) == 1
    assert "srpo keys list" in capsys.readouterr().err
    assert srpo(["usage", *where, "--since", "2026-02-02", "--until", "2026-01-01"]) == 2
    assert "before" in capsys.readouterr().err
    assert srpo(["usage", *where, "--csv", "--until", "2020-01-01", "--since", "2020-01-01"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("day,key,name,requests")


def test_a_quota_holds_for_any_number_of_requests_at_a_time(server: Server) -> None:
    identity, key = server.add(name="bob", images_per_day=5)
    with ThreadPoolExecutor(12) as threads:
        replies = list(threads.map(lambda number: server.post(key, {} if number % 2 else PREFER), range(12)))
    assert sorted(reply.status_code for reply in replies if reply.status_code != 403)[:1] in ([201], [202])
    refused = [reply for reply in replies if reply.status_code == 403]
    assert len(refused) == 7
    assert {reply.json()["error"]["code"] for reply in refused} == {"insufficient_quota"}
    assert within(START_LIMIT, lambda: server.row(identity)["images"] == 5)
    assert "0 of them are left" in server.post(key).json()["message"]


def test_no_work_begins_for_jobs_beyond_a_quota(server: Server, tmp_path: Path) -> None:
    _, key = server.add(name="dora", images_per_day=random.randrange(1, 4))
    assert within(START_LIMIT, lambda: server.post(key).status_code == 403)
    gate = Gate(tmp_path / "gate")
    gate.allow(1000)
    for _ in range(20):
        assert server.post(key, PREFER, prompt=gate.prompt).status_code == 403
    assert gate.begun == 0


def test_what_fails_or_is_cancelled_gives_its_part_of_the_quota_back(server: Server, tmp_path: Path) -> None:
    identity, key = server.add(name="carol", images_per_day=4)
    gate = Gate(tmp_path / "gate")
    job = server.post(key, PREFER, prompt=gate.prompt, num_images=2).json()["id"]
    assert server.post(key, num_images=3).status_code == 403
    call(server.scripted, "DELETE", f"/v1/jobs/{job}", key)
    gate.allow(1000)
    assert server.post(key, prompt="raise", num_images=4).status_code == 500
    assert within(START_LIMIT, lambda: server.post(key, PREFER, prompt="oom", num_images=4).status_code == 202)
    assert within(START_LIMIT, lambda: server.post(key, num_images=4).status_code == 201)
    assert server.row(identity)["images"] == 4


def test_a_reply_waits_only_a_moment_for_a_locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr("server.database.sqlite.BUSY_TIMEOUT", 0.01)
    monkeypatch.setattr("server.usage.writer.PATIENCE", 0.5)
    with Scripted(tmp_path, safety_checker="none") as scripted:
        with locked(tmp_path / "jobs.sqlite3"):
            assert httpx.post(f"{scripted.url}{PATH}", json=BODY, timeout=START_LIMIT).status_code == 201
            assert scripted.app.parts.usage.unwritten == 1
        assert within(START_LIMIT, lambda: scripted.app.parts.usage.unwritten == 0)
    with opened(tmp_path) as database:
        (row,) = UsageLedger(database).report("2000-01-01", "2999-12-31")
    assert (row.owner, row.requests) == ("", 1)


async def test_an_error_that_nobody_knows_loses_no_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, tries, settled = UsageLedger.settle, 0, threading.Event()

    def fail_once(ledger: UsageLedger, *amounts: Any) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OperationalError("INSERT", None, Exception("nobody knows"))
        settle(ledger, *amounts)
        settled.set()

    monkeypatch.setattr(UsageLedger, "settle", fail_once)
    with opened(tmp_path) as database:
        pools = ThreadPools()
        usage = UsageWriter(UsageLedger(database), pools)
        writing = asyncio.ensure_future(usage.run())
        await usage.record(UsageEntry("alice", 2, 2**18, 1.5, 7), None)
        while not settled.is_set():
            assert not writing.done()
            await asyncio.sleep(0.01)
        writing.cancel()
        await usage.stop()
        pools.close()
        (row,) = UsageLedger(database).report("2000-01-01", "2999-12-31")
    assert (row.requests, row.images) == (1, 2)


def rows_of(folder: Path) -> list[tuple[int, int]]:
    with opened(folder) as database:
        return [(row.requests, row.images) for row in UsageLedger(database).report("2000-01-01", "2999-12-31")]


def test_a_kill_loses_no_usage_and_counts_none_twice(tmp_path: Path) -> None:
    gate, folder = Gate(tmp_path / "gate"), tmp_path / "data"
    with scripted_process(folder) as server:
        assert call(server, "POST", PATH, json=BODY | {"num_images": 2}).status_code == 201
        body = BODY | {"prompt": gate.prompt, "num_inference_steps": 2}
        job = call(server, "POST", PATH, json=body, headers=PREFER).json()["id"]
        Scripted.until(lambda: gate.begun == 1)
        server.process.kill()
        server.process.wait()
    assert rows_of(folder) == [(1, 2)]
    gate.allow(1000)
    with scripted_process(folder) as server:
        assert ended(server, job)["status"] == "succeeded"
        server.process.kill()
        server.process.wait()
    assert rows_of(folder) == [(2, 3)]


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    where: Path | str = tmp_path
    if request.param == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        where = postgres.create_database().replace("postgresql://", "postgresql+psycopg://")
    with opened(where) as found:
        yield found


def test_a_quota_begins_anew_with_the_day_and_old_reservations_lapse(database: Database) -> None:
    now = [NOON]
    ledger = UsageLedger(database, lambda: now[0])
    assert ledger.today() == DAY == day_of(NOON)
    ledger.accept(Reservation("a", "alice", 6, 10, seconds=3600))
    ledger.accept(Reservation("lapsed", "alice", 4, 10, seconds=-1))
    with pytest.raises(QuotaSpent):
        ledger.accept(Reservation("b", "alice", 5, 10))
    ledger.accept(Reservation("b", "bob", 5, 10))
    ledger.settle([UsageEntry("alice", 6, 6 * 2**18, 1.5, 7)], ["a"])
    ledger.sweep()
    with pytest.raises(QuotaSpent):
        ledger.accept(Reservation("c", "alice", 5, 10))
    ledger.accept(Reservation("c", "alice", 4, 10))
    ledger.settle([], ["c"])
    now[0] += 86400 / 2
    ledger.accept(Reservation("d", "alice", 10, 10))
    (row,) = ledger.report(DAY, "2026-11-27")
    assert (row.day, row.requests, row.images, row.pixels, row.credits) == (DAY, 1, 6, 6 * 2**18, 7)


def test_a_quota_holds_over_threads_and_servers(database: Database) -> None:
    ledgers = [UsageLedger(database), UsageLedger(database)]

    def take(number: int) -> bool:
        try:
            ledgers[number % 2].accept(Reservation(f"request_{number}", "alice", 1, 10))
        except QuotaSpent:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(take, range(30))) == 10
