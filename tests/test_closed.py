"""What the server keeps to itself, and what it does not let others bring in."""

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError
from support.scripted_server import Scripted
from support.server import START_LIMIT, LiveServer, running

from server.envelope import envelope, headers_of
from server.errors import LinkRefused
from server.images.constant import is_constant
from server.images.links import ImageLinks


@pytest.mark.long
def test_a_module_in_the_current_folder_is_never_imported(tmp_path: Path) -> None:
    """Someone who can write into the folder where the server is started must not run code in it."""
    for name in ("diffusers", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit(1)\n")
    with running(tmp_path / "server", cwd=tmp_path) as server:
        assert server.generate().status_code == 201
    assert not (tmp_path / "ran").exists()


@pytest.mark.long
def test_no_other_user_can_read_the_data_folder_s_files(tmp_path: Path) -> None:
    """Prompts are in the job database, pictures in the store. What an earlier version left open is closed too."""
    data = tmp_path / "server" / "data"
    (data / "images" / "ab").mkdir(parents=True)
    (data / "images.key").write_bytes(b"k" * 32)
    for path in (data / "images", data / "images.key"):
        path.chmod(0o755)
    with running(tmp_path / "server") as server:
        assert server.generate().status_code == 201
        with server.client(headers={"idempotency-key": "one"}) as client:
            body = {"model": "flux/srpo", "prompt": "a secret", "image_size": "square", "num_inference_steps": 1}
            assert client.post("/v1/images/generations", json=body).status_code == 201
        open_to_others = [path for path in data.rglob("*") if is_open(path) and "ab" not in path.name]
        assert open_to_others == []
        assert {"jobs.sqlite3", "images", "images.key", "server.lock"} <= {path.name for path in data.iterdir()}


def is_open(path: Path) -> bool:
    """Whether others may read it, where the server has not taken it away meanwhile."""
    with suppress(FileNotFoundError):
        return bool(path.stat().st_mode & 0o077)
    return False


def test_without_a_key_health_says_that_it_lives_what_it_serves_and_how_long_the_queue_is(
    live_with_key: LiveServer,
) -> None:
    def ask(**headers: str) -> dict[str, Any]:
        reply = httpx.get(f"{live_with_key.url}/health", headers=headers)
        assert reply.status_code == 200
        body: dict[str, Any] = reply.json()
        return body

    said = {"status", "served_model", "embedded", "state", "stage", "progress", "eta", "waiting", "running"}
    assert ask().keys() == said
    assert ask(authorization="Bearer wrong").keys() == said
    assert ask(authorization="Bearer secret-key-2").keys() > said | {"worker_pids", "device", "safety", "failure"}


def test_nothing_of_a_foreign_error_reaches_clients() -> None:
    """SQLAlchemy's errors have a `code`, others have `headers`, `param` or `retry_after`."""
    error = OperationalError("SELECT prompt", {"prompt": "a secret"}, Exception("disk I/O error"))
    vars(error).update(param="secret", issues=["secret"], retry_after=3.0, headers={"x-secret": "1"}, stage="secret")
    assert error.code  # SQLAlchemy's own
    body = envelope(error, "id", "/v1/images/generations")
    assert body["error"]["code"] == "internal_error"
    assert (body["error"]["param"], body["error"]["data"]) == (None, [])
    assert "secret" not in str(body)
    assert headers_of(error) == {}


def test_a_request_with_two_lengths_is_the_last_of_its_connection(live: LiveServer) -> None:
    """What follows it may be another request to this server, and part of the body to the proxy before it."""
    smuggled = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    request = (
        b"POST /v1/images/generations HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", live.port), timeout=START_LIMIT) as sock:
        sock.sendall(request + smuggled)
        answered = b""
        while part := sock.recv(2**16):
            answered += part
    assert answered.startswith(b"HTTP/1.1 400 ")
    assert answered.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answered.lower()


@pytest.mark.parametrize("setting", ["note", "error"])
def test_an_image_of_one_colour_is_counted_and_said_or_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """The scripted engine fills its pictures with one number."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    body = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1, "num_images": 2}
    with Scripted(tmp_path, safety_checker="none", constant_images=setting) as server:
        reply = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=START_LIMIT)
        counted = httpx.get(f"{server.url}/health").json()["constant_images"]
    if setting == "error":
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "constant_image")
    else:
        assert reply.json()["timings"]["notes"] == [f"image {index} is all of one colour" for index in range(2)]
    assert counted == 2


@given(st.binary(min_size=3, max_size=3), st.integers(1, 400), st.data())
def test_one_other_byte_makes_an_image_not_constant(pixel: bytes, count: int, data: st.DataObject) -> None:
    pixels = bytearray(pixel * (count + 1))
    assert is_constant(bytes(pixels))
    pixels[data.draw(st.integers(0, len(pixels) - 1))] ^= data.draw(st.integers(1, 255))
    assert not is_constant(bytes(pixels))


def test_image_addresses_can_be_signed_and_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    body = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1}
    key = {"idempotency-key": "one"}
    generations = "/v1/images/generations"
    with httpx.Client(timeout=START_LIMIT) as client:
        with Scripted(tmp_path, safety_checker="none", link_lifetime=1000.0, link_secrets=("new", "old")) as server:
            reply = client.post(server.url + generations, json=body, headers=key)
            url = reply.json()["data"][0]["url"]
            shown = client.get(url)
            assert shown.status_code == 200
            assert int(shown.headers["cache-control"].split("max-age=")[1].split(",")[0]) <= 1001  # for caches between
            plain, _, query = url.partition("?")
            changed = url[:-2] + ("A" if url[-2] != "A" else "B") + url[-1]
            wrong = [plain, changed, url.replace("expires=", "expires=1"), f"{plain}?{query[:20]}"]
            for address in wrong:
                refused = client.get(address)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "link_refused")
        with Scripted(tmp_path, safety_checker="none", link_lifetime=2000.0, link_secrets=("newest", "new")) as server:
            address = server.url + url.partition(f":{httpx.URL(url).port}")[2]
            assert client.get(address).status_code == 200  # the old first secret is still accepted
            again = client.post(server.url + generations, json=body, headers=key)
            assert again.headers["idempotent-replayed"] == "true"
            renewed = again.json()["data"][0]["url"]
            assert renewed != url
            assert again.json()["images"][0]["url"] == renewed
        with Scripted(tmp_path, safety_checker="none", link_lifetime=1000.0, link_secrets=("another",)) as server:
            address = server.url + url.partition(f":{httpx.URL(url).port}")[2]
            assert client.get(address).status_code == 403


def test_a_signed_address_is_over_when_its_time_is() -> None:
    now = 1000.0
    links = ImageLinks(60, [b"secret"], lambda: now)
    query = dict(httpx.URL(links.make("http://server", "name.png")).params)
    links.check("name.png", query)
    with pytest.raises(LinkRefused):
        links.check("other.png", query)
    now += 61
    with pytest.raises(LinkRefused):
        links.check("name.png", query)
