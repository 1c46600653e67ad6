"""Keys in the database: made, shown once, scoped, limited, rotated and revoked while the server runs."""

import asyncio
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from support.jobs import PREFER, call
from support.ledgers import opened
from support.postgres import Postgres
from support.scripted_server import Gate, Scripted
from support.server import START_LIMIT
from support.waiting import within

from pipelines.workers.pool import WorkerPool
from server.cli import keys as cli
from server.errors import KeyRateReached, NotFound, Unauthorized
from server.process.threads import ThreadPools
from server.security import service
from server.security.callers import Caller, Quota
from server.security.keys import KeyRing
from server.security.limits import KeyLimits
from server.security.rates import RequestRates
from server.security.store import KeyStore

PATH = "/v1/images/generations"
BODY = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1}
FIXED = "a-key-from-the-settings"


class Keyed:
    """A server with a key of the settings and one with the scope `admin`, made before its start."""

    def __init__(self, server: Scripted, folder: Path, admin: str) -> None:
        self.server = server
        self.folder = folder
        self.admin = admin

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        return call(self.server, method, path, key or self.admin, **options)

    def add(self, **fields: Any) -> dict[str, Any]:
        reply = self.ask("POST", "/v1/admin/keys", json=fields)
        assert reply.status_code == 201, reply.text
        made: dict[str, Any] = reply.json()
        return made

    def draw(self, key: str, **fields: Any) -> httpx.Response:
        return self.ask("POST", PATH, key, json=BODY | fields)

    def code(self, reply: httpx.Response) -> tuple[int, str]:
        return reply.status_code, reply.json()["error"]["code"]


Srpo = Callable[..., Any]


@pytest.fixture
def srpo(capsys: pytest.CaptureFixture[str]) -> Iterator[Srpo]:
    """`srpo keys ...`, and what it printed; the last line as JSON where it was asked for. It changes the umask."""
    before = os.umask(0o022)

    def run(*arguments: str) -> Any:
        assert cli.main([*arguments]) == 0
        text = capsys.readouterr().out
        return json.loads(text.splitlines()[-1]) if "--json" in arguments else text

    yield run
    os.umask(before)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    with opened(folder) as database:
        _, admin = KeyStore(database).add("root", ("admin",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setattr(service, "INTERVAL", 0.05)
        options: dict[str, Any] = {"api_keys": (FIXED,), "key_delay": 0.0, "safety_checker": "none"}
        with Scripted(folder, queue_size=300, **options) as server:
            yield Keyed(server, folder, admin)


def test_a_key_is_shown_once_and_only_its_hash_is_kept(keyed: Keyed) -> None:
    made = keyed.add(name="alice")
    assert made["key"].startswith(f"{made['prefixes'][0]}-")
    assert keyed.draw(made["key"]).status_code == 201
    listed = keyed.ask("GET", "/v1/admin/keys")
    assert made["id"] in [key["id"] for key in listed.json()["data"]]
    secret = made["key"].removeprefix(made["prefixes"][0])
    assert secret not in listed.text
    assert "hash" not in listed.text
    stored = b"".join(path.read_bytes() for path in keyed.folder.glob("jobs.sqlite3*"))
    assert made["prefixes"][0].encode() in stored
    assert secret.encode() not in stored


def test_a_post_without_a_body_needs_no_headers_of_one(keyed: Keyed) -> None:
    """curl -X POST sends neither a length nor a type."""
    made = keyed.add(name="bare")
    head = f"POST /v1/admin/keys/{made['id']}/rotate HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", keyed.server.port)) as connection:
        connection.sendall(f"{head}authorization: Bearer {keyed.admin}\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert reply.startswith(b"HTTP/1.1 200"), reply


def test_the_command_line_changes_a_running_server(
    keyed: Keyed, srpo: Srpo, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--data-dir", str(keyed.folder))
    made = srpo("add", "bob", *where, "--scopes", "generate,metrics", "--expires", "30d", "--json")
    assert made["scopes"] == ["generate", "metrics"]
    assert made["expires_at"] - made["created_at"] == pytest.approx(30 * 86400, abs=2)
    assert within(START_LIMIT, lambda: keyed.draw(made["key"]).status_code == 201)
    assert made["key"] not in srpo("list", *where)
    assert made["prefixes"][0] in srpo("list", *where)
    another = srpo("rotate", made["id"], *where, "--json")
    assert within(START_LIMIT, lambda: keyed.draw(made["key"]).status_code == 401)
    assert keyed.draw(another["key"]).status_code == 201
    assert "revoked" in srpo("revoke", another["prefixes"][0], *where)
    assert within(START_LIMIT, lambda: keyed.draw(another["key"]).status_code == 401)
    for command in ("revoke", "rotate"):
        assert cli.main([command, "key_unknown", *where]) == 1
        assert "srpo keys list" in capsys.readouterr().err
    assert cli.main(["rotate", made["id"], *where]) == 1
    assert "srpo keys add" in capsys.readouterr().err
    assert cli.main(["list", "--data-dir", str(keyed.folder / "nothing")]) == 2
    assert cli.main(["add", "eve", "--data-dir", "/proc/nothing"]) == 2
    assert "--data-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["add", ""], "srpo keys add: NAME: "),
        (["add", "eve", "--expires", "tomorrow"], "'tomorrow': expected seconds, or a time such as 15m"),
        (["add", "two\nlines"], "srpo keys add: NAME: expected a printable string of 1 to 64 characters"),
        (["add", "eve", "--scopes", "wizard"], "expected a list of some of generate, admin, metrics"),
        (["add", "eve", "--expires", "9999999d"], "SRPO_EXPIRES (--expires): expected a number from 1 to 315360000"),
        (["add", "eve", "--expires", "inf"], "SRPO_EXPIRES (--expires): expected a number from 1 to 315360000"),
        (
            ["add", "eve", "--images-per-day", "3000000000"],
            "(--images-per-day): expected an integer from 1 to 2147483647",
        ),
        (["add", "eve", "--concurrent-requests", "many"], "(--concurrent-requests): expected an integer from 1 to"),
        (["rotate", "key_1", "--grace", "9999999d"], "SRPO_GRACE (--grace): expected a number from 0 to 315360000"),
        (["rotate", "key_1", "--grace", "3x"], "'3x': expected seconds"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_to_write(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_the_largest_quota_fits_a_database_of_postgres(postgres: Postgres, srpo: Srpo) -> None:
    where = ("--database-url", postgres.create_database())
    most = 2**31 - 1
    made = srpo("add", "eve", *where, f"--images-per-day={most}", f"--concurrent-requests={most}", "--json")
    assert (made["images_per_day"], made["concurrent_requests"]) == (most, most)
    assert str(most) in srpo("list", *where)


def test_a_revoked_key_is_refused_at_once_by_the_server_that_was_told(keyed: Keyed) -> None:
    made = keyed.add(name="carol")
    assert keyed.draw(made["key"]).status_code == 201
    ended_key = keyed.ask("DELETE", f"/v1/admin/keys/{made['id']}").json()
    assert keyed.code(keyed.draw(made["key"])) == (401, "invalid_api_key")
    assert ended_key["revoked_at"] is not None
    assert ended_key["prefixes"] == []
    assert keyed.ask("DELETE", f"/v1/admin/keys/{made['id']}").json() == ended_key
    assert keyed.ask("POST", f"/v1/admin/keys/{made['id']}/rotate").status_code == 404


def test_a_rotated_key_keeps_its_jobs_and_its_old_text_for_a_while(keyed: Keyed) -> None:
    made = keyed.add(name="dave")
    job = keyed.ask("POST", PATH, made["key"], json=BODY, headers=PREFER).json()["id"]
    new = keyed.ask("POST", f"/v1/admin/keys/{made['id']}/rotate", json={"grace": 600}).json()
    assert len(new["prefixes"]) == 2
    for key in (made["key"], new["key"]):
        assert keyed.ask("GET", f"/v1/jobs/{job}", key).status_code == 200
    last = keyed.ask("POST", f"/v1/admin/keys/{made['id']}/rotate").json()
    assert keyed.draw(made["key"]).status_code == keyed.draw(new["key"]).status_code == 401
    assert keyed.ask("GET", f"/v1/jobs/{job}", last["key"]).status_code == 200


def test_a_key_does_what_its_scopes_say(keyed: Keyed) -> None:
    metrics = keyed.add(name="prometheus", scopes=["metrics"])["key"]
    drawer = keyed.add(name="erin")["key"]
    assert keyed.ask("GET", "/metrics", metrics).status_code == 200
    assert keyed.code(keyed.draw(metrics)) == (403, "insufficient_scope")
    assert keyed.code(keyed.draw(keyed.admin)) == (403, "insufficient_scope")
    for key in (FIXED, drawer):
        assert keyed.draw(key).status_code == 201
        assert keyed.code(keyed.ask("GET", "/metrics", key)) == (403, "insufficient_scope")
        assert keyed.code(keyed.ask("GET", "/v1/admin/keys", key)) == (403, "insufficient_scope")
    assert keyed.ask("GET", "/v1/models", metrics).status_code == 200
    assert "workers" in keyed.ask("GET", "/health", drawer).json()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"images_per_day": 0}, "images_per_day"),
        ({"images_per_day": 3_000_000_000}, "images_per_day"),
        ({"images_per_day": "5"}, "images_per_day"),
        ({"expires_in": "30d"}, "expires_in"),
        ({"quota": 5}, "quota"),
        ({"name": ""}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": "two\nlines"}, "name"),
    ],
)
def test_a_key_that_is_not_understood_is_not_made(keyed: Keyed, fields: dict[str, Any], param: str) -> None:
    reply = keyed.ask("POST", "/v1/admin/keys", json={"name": "frank"} | fields)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_requests_a_minute_and_when_the_next_may_come(keyed: Keyed) -> None:
    key = keyed.add(name="grace", requests_per_minute=2)["key"]
    before = time.monotonic()
    assert [keyed.draw(key).status_code for _ in range(2)] == [201, 201]
    refused = keyed.draw(key)
    passed = time.monotonic() - before
    assert keyed.code(refused) == (429, "rate_limit_exceeded")
    assert 60 - passed <= int(refused.headers["retry-after-ms"]) / 1000 + 0.01
    assert int(refused.headers["retry-after"]) <= 60
    assert keyed.ask("GET", "/v1/jobs", key).status_code == 200


def test_unfinished_requests_at_a_time(keyed: Keyed, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    key = keyed.add(name="heidi", concurrent_requests=2)["key"]
    jobs = [keyed.ask("POST", PATH, key, json=BODY | {"prompt": gate.prompt}, headers=PREFER).json() for _ in range(2)]
    assert keyed.code(keyed.draw(key)) == (429, "rate_limit_exceeded")
    gate.allow(1000)
    for job in jobs:
        assert within(START_LIMIT, lambda: "reply" in keyed.ask("GET", f"/v1/jobs/{job['id']}", key).json())  # noqa: B023
    assert keyed.draw(key).status_code == 201


@pytest.mark.long
async def test_two_hundred_requests_of_one_key_hold_back_no_other(keyed: Keyed, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    greedy, modest = keyed.add(name="ivan", concurrent_requests=200)["key"], keyed.add(name="judy")["key"]
    async with httpx.AsyncClient(base_url=keyed.server.url, timeout=START_LIMIT, limits=httpx.Limits()) as client:

        async def post(key: str, prompt: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return (await client.post(PATH, json=BODY | {"prompt": prompt}, headers=headers)).status_code

        crowd = [asyncio.create_task(post(greedy, gate.prompt)) for _ in range(200)]
        try:
            async with asyncio.timeout(START_LIMIT):
                while keyed.server.pool.status().waiting < 199:
                    await asyncio.sleep(0.01)
            assert await post(greedy, "x") == 429
            small = asyncio.create_task(post(modest, "x"))
            async with asyncio.timeout(START_LIMIT):
                while keyed.server.pool.status().waiting < 200:
                    await asyncio.sleep(0.01)
            gate.allow(1)
            assert await small == 201
            assert gate.begun <= 2  # of 200: one was being drawn, and at most one more began meanwhile
        finally:
            gate.allow(10_000)
        assert set(await asyncio.gather(*crowd)) == {201}


def test_the_first_key_closes_a_server_and_its_end_does_not_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, srpo: Srpo
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(service, "INTERVAL", 0.05)
    with Scripted(tmp_path, safety_checker="none") as server:
        page = {"origin": "https://elsewhere.example"}
        assert httpx.post(f"{server.url}{PATH}", json=BODY).status_code == 201
        assert httpx.post(f"{server.url}{PATH}", json=BODY, headers=page).json()["error"]["code"] == "foreign_origin"
        assert httpx.get(f"{server.url}/v1/admin/keys").json()["error"]["code"] == "insufficient_scope"
        made = srpo("add", "first", "--data-dir", str(tmp_path), "--json")
        assert within(START_LIMIT, lambda: httpx.get(f"{server.url}/v1/jobs").status_code == 401)
        assert call(server, "GET", "/v1/jobs", made["key"]).status_code == 200
        drawn = call(server, "POST", PATH, made["key"], json=BODY, headers=page)  # the key is the proof, not the page
        assert (drawn.status_code, drawn.headers["access-control-allow-origin"]) == (201, "*")
        srpo("revoke", made["id"], "--data-dir", str(tmp_path))
        assert within(START_LIMIT, lambda: call(server, "GET", "/v1/jobs", made["key"]).status_code == 401)
        assert httpx.post(f"{server.url}{PATH}", json=BODY).status_code == 401


def test_keys_end_at_their_time(tmp_path: Path) -> None:
    now = [1000.0]
    with opened(tmp_path) as database:
        store = KeyStore(database, lambda: now[0])
        ring = KeyRing(now=lambda: now[0])
        record, text = store.add("short", expires=1100.0)
        _, second = store.rotate(record.id, grace=500.0)
        ring.replace(store.read())
        assert ring.authenticate(text).owner == ring.authenticate(second).owner == record.id
        now[0] = 1100.0
        for key in (text, second, None, "", record.id, text[:15], f"{text[:15]}-", f"{text}x"):
            with pytest.raises(Unauthorized):
                ring.authenticate(key)
        with pytest.raises(NotFound):
            store.revoke("key_unknown")


def test_a_second_rotation_ends_no_text_earlier_than_was_said(tmp_path: Path) -> None:
    now = [1000.0]
    with opened(tmp_path) as database:
        store = KeyStore(database, lambda: now[0])
        ring = KeyRing(now=lambda: now[0])
        record, first = store.add("often")
        _, second = store.rotate(record.id, grace=100.0)
        _, third = store.rotate(record.id, grace=500.0)
        ring.replace(store.read())
        assert {ring.authenticate(text).owner for text in (first, second, third)} == {record.id}
        now[0] = 1100.0
        with pytest.raises(Unauthorized):
            ring.authenticate(first)
        assert ring.authenticate(second).owner == record.id
        now[0] = 1500.0
        with pytest.raises(Unauthorized):
            ring.authenticate(second)
        assert ring.authenticate(third).owner == record.id
        store.rotate(record.id)
        ring.replace(store.read())
        with pytest.raises(Unauthorized):
            ring.authenticate(third)


def test_a_server_that_requires_keys_is_closed_before_it_has_one() -> None:
    with pytest.raises(Unauthorized):
        KeyRing(required=True).authenticate(None)


def test_servers_with_one_database_share_keys_and_rates(postgres: Postgres) -> None:
    url = postgres.create_database().replace("postgresql://", "postgresql+psycopg://")
    with opened(url) as one, opened(url) as other:
        record, text = KeyStore(one).add("shared", quota=Quota(5, 6, 7))
        ring = KeyRing()
        ring.replace(KeyStore(other).read())
        assert ring.authenticate(text).quota == Quota(5, 6, 7)
        KeyStore(other).revoke(record.id)
        ring.replace(KeyStore(one).read())
        with pytest.raises(Unauthorized):
            ring.authenticate(text)
        rates = [RequestRates(one), RequestRates(other)]
        with ThreadPoolExecutor(8) as threads:
            waits = list(threads.map(lambda number: rates[number % 2].take("key_x", 10), range(40)))
        assert waits.count(None) == 10
        assert all(0 < wait <= 60 for wait in waits if wait is not None)
        assert rates[0].take("key_y", 10) is None
        limits = KeyLimits(Quota(), WorkerPool(lambda _: []), rates[0], ThreadPools())
        statements: list[str] = []
        with one.connection() as connection:
            sa.event.listen(connection.engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
        for _ in range(20):
            with pytest.raises(KeyRateReached):
                asyncio.run(limits.count_request(Caller("key_x", quota=Quota(requests_per_minute=10))))
        assert statements == []  # it is known until when the key is refused


def test_a_date_that_is_set_back_refuses_no_key_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that had sent its requests waited until the date had caught up."""
    per_minute, now = random.randint(1, 50), [1000.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], time=time.time
    )  # not that of event loops, which would sleep for hours
    monkeypatch.setattr("server.security.rates.time", clock)
    with opened(tmp_path) as database:
        rates = RequestRates(database)
        assert [rates.take("key_x", per_minute) for _ in range(per_minute)] == [None] * per_minute
        clock.time = lambda: time.time() - 3600
        now[0] += 20.0
        assert rates.take("key_x", per_minute) == 40.0
        assert rates.take("key_x", per_minute + 1) is None
        now[0] += 40.0
        assert rates.take("key_x", per_minute) == (None if per_minute > 1 else 20.0)
