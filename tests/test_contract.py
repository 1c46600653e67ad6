"""The contract's edges on a real socket: paths, methods, bodies, files, origins, keys, headers, money, logs.

What the real clients make of it is in the tests of the clients; random input is in the fuzz tests.
"""

import asyncio
import base64
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from structlog.testing import capture_logs
from support.server import LiveServer, running

from bench.support.instant import InstantPool
from pipelines.errors import QueueFull
from pipelines.request import ImageRequest
from server.app import create_app
from server.engine_setup import build_engine_config
from server.settings.server import Settings

direct = pytest.mark.direct
PATH = "/v1/images/generations"
PATHS = (PATH, PATH + "/", "/images/generations", "/images/generations/")
BODY: dict[str, Any] = {"model": "flux/srpo", "prompt": "a red apple", "image_size": "square", "num_inference_steps": 1}
JSON = {"content-type": "application/json"}
KEY = {"authorization": "Bearer secret-key-1"}
FOREIGN = {"origin": "https://elsewhere.example"}
LIMIT = 2**24
EXPOSED = ("x-request-id", "x-inference-id", "x-client-request-id", "x-aimlapi-credits-used", "x-aimlapi-usd-spent")


def refused(reply: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error of a reply which must be the envelope of `status`."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert body.keys() >= {"requestId", "statusCode", "timestamp", "path", "message", "title", "status", "instance"}
    assert body["status"] == body["statusCode"] == status
    assert body["path"] == body["instance"] == reply.url.path
    assert body["requestId"] == reply.headers["x-request-id"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", body["timestamp"])
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code", "name", "data"}
    assert body["message"] == error["message"]
    assert (error["param"], error["code"]) == (param, code or error["code"])
    return error


def call(server: LiveServer, method: str, path: str, **options: Any) -> httpx.Response:
    with server.client() as client:
        return client.request(method, path, **options)


def exchange(port: int, *parts: bytes) -> bytes:
    """Send raw bytes, read until the server closes (or nothing more comes for a while)."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        for part in parts:
            connection.sendall(part)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with other settings."""
    with running(
        tmp_path_factory.mktemp("tuned"),
        success_status="200",
        credits_per_megapixel="0",
        public_url="https://images.example/base/",
        images_expire="1",
        body_timeout="1",
        queue_size="1",
        max_running="1",
        log_format="console",
    ) as server:
        yield server


@pytest.fixture(scope="module")
def image(live: LiveServer) -> dict[str, Any]:
    """One stored image's item."""
    item: dict[str, Any] = live.generate(output_format="png").json()["images"][0]
    return item


# --- paths, methods, bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *(("GET", path, {"POST"}) for path in PATHS),
        ("PUT", PATH, {"POST"}),
        ("HEAD", PATH, {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("DELETE", "/v1/models/flux/srpo", {"GET", "HEAD"}),
        ("POST", "/files/x.jpeg", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("PUT", "/v1/jobs/job_0", {"GET", "DELETE"}),
    ],
)
def test_a_wrong_method_is_a_405_that_says_which(live: LiveServer, method: str, path: str, allowed: set[str]) -> None:
    reply = call(live, method, path)
    assert set(reply.headers["allow"].split(", ")) == allowed
    if method == "HEAD":
        assert (reply.status_code, reply.content) == (405, b"")
    else:
        refused(reply, 405, "method_not_allowed")


@pytest.mark.parametrize(
    "path",
    [
        "/x",
        "/v1",
        "/v1/images/nothing",
        "/v1/models/flux/x",
        "/docs/x",
        "/files/",
        "/v1/images/generations/x",
        pytest.param("/%00", marks=direct),
    ],
)
def test_nothing_at_this_path(live: LiveServer, path: str) -> None:
    refused(call(live, "GET", path), 404, "not_found")


@pytest.mark.parametrize("path", PATHS)
def test_the_other_spellings_of_the_path_do_not_redirect(live: LiveServer, path: str) -> None:
    reply = call(live, "POST", path, json=BODY | {"sync_mode": True})
    assert (reply.status_code, len(reply.history)) == (201, 0)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_hears_that_its_body_is_too_large(live: LiveServer, chunked: bool) -> None:
    body = b'{"model":"flux/srpo","prompt":"' + b"x" * (LIMIT + 2**20)
    content = (body[at : at + 2**16] for at in range(0, len(body), 2**16)) if chunked else body
    reply = call(live, "POST", PATH, content=content, headers=JSON)
    assert "16,777,216" in refused(reply, 413, "body_too_large")["message"]


@pytest.mark.parametrize(("extra", "status"), [(0, 201), (1, 413)])
def test_the_limit_is_exact(live: LiveServer, extra: int, status: int) -> None:
    start = json.dumps(BODY | {"sync_mode": True})[:-1].encode() + b',"padding":"'
    body = start + b"x" * (LIMIT - len(start) - 2 + extra) + b'"}'
    assert call(live, "POST", PATH, content=body, headers=JSON).status_code == status


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "text/plain",
        "application/jsonx",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
    ],
)
def test_only_json_is_a_body(live: LiveServer, sent: str | None) -> None:
    headers = {} if sent is None else {"content-type": sent}
    error = refused(call(live, "POST", PATH, content=json.dumps(BODY), headers=headers), 400, None, "content-type")
    assert (error["data"][0]["expected"], error["data"][0]["path"]) == ("application/json", ["content-type"])


def test_a_server_without_keys_says_how_to_make_the_one_that_is_needed(live: LiveServer) -> None:
    error = refused(call(live, "GET", "/v1/admin/keys"), 403, "insufficient_scope")
    assert error["message"].endswith("`srpo keys add NAME --scopes admin` makes one.")


def test_a_compressed_body_is_refused_as_one(live: LiveServer) -> None:
    content = gzip.compress(json.dumps(BODY).encode())
    reply = call(live, "POST", PATH, content=content, headers=JSON | {"content-encoding": "gzip"})
    error = refused(reply, 400, "invalid_content_encoding", "content-encoding")
    assert error["message"] == "content-encoding: gzip is not taken: send the body as it is"


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        ("null", "null"),
        ("[]", "an array"),
        ('"x"', "a string"),
        ("1", "a number"),
        ("1.5", "a number"),
        ("true", "a boolean"),
    ],
)
def test_a_body_that_is_no_object_is_named_as_json_names_it(live: LiveServer, sent: str, kind: str) -> None:
    error = refused(call(live, "POST", PATH, content=sent, headers=JSON), 400, "invalid_body")
    assert error["message"] == f"body: expected a JSON object, received {kind}"


@pytest.mark.parametrize(
    ("sent", "mark"),
    [
        ("application/json; charset=utf-8", b""),
        ("Application/JSON;charset=latin-1", b""),
        ("application/json", b"\xef\xbb\xbf"),
    ],
)
def test_json_with_a_charset_or_a_byte_order_mark(live: LiveServer, sent: str, mark: bytes) -> None:
    body = mark + json.dumps(BODY | {"prompt": "é"}, ensure_ascii=False).encode()
    reply = call(live, "POST", PATH, content=body, headers={"content-type": sent})
    assert (reply.status_code, reply.json()["prompt"]) == (201, "é")


def test_a_body_that_does_not_come_is_a_408(tuned: LiveServer) -> None:
    reply = exchange(
        tuned.port, b"POST %b HTTP/1.1\r\nHost: localhost\r\n" % PATH.encode(),
        b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n", b'{"model":',
    )  # fmt: skip
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"x-should-retry: false" in head
    assert json.loads(body)["error"]["code"] == "body_timeout"


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"model": "flux/other"}, "model_not_found", "model", "expected one of flux/srpo"),
        ({"model": "flux/other/image-to-image"}, "model_not_found", "model", "expected one of flux/srpo"),
        (
            {"image_size": {"width": 1000}}, "invalid_image_size", "image_size.width",
            "image_size.width: expected a multiple of 32 from 512 to 1536, received 1000",
        ),
        ({"num_inference_steps": "28"}, "invalid_integer", "num_inference_steps", "received '28'"),
        ({"num_images": True}, "invalid_integer", "num_images", "received true"),
        ({"seed": 2.0**53 + 2}, "invalid_integer", "seed", ""),
        ({"prompt": "x" * 4001}, "invalid_string", "prompt", "received a string of 4001 characters"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(live: LiveServer, fields: dict[str, Any], code: str, param: str, words: str) -> None:
    assert words in refused(live.generate(**fields), 400, code, param)["message"]


# --- replies ---------------------------------------------------------------------------------------------------------


def test_null_means_absent(live: LiveServer) -> None:
    optional = (
        "guidance_scale",
        "num_images",
        "seed",
        "sync_mode",
        "enable_safety_checker",
        "output_format",
        "acceleration",
    )
    foreign = ("n", "size", "response_format", "output_format", "stream", "extra_body", "user")
    reply = live.generate(**dict.fromkeys((*optional, *foreign, "image_size")))
    body = reply.json()
    assert (reply.status_code, len(body["images"])) == (201, 1)
    assert (body["images"][0]["width"], body["images"][0]["height"]) == (1024, 768)
    assert body["images"][0]["content_type"] == "image/jpeg"
    assert 1 <= body["seed"] < 2**31
    assert "x-ignored-fields" not in reply.headers


def test_integral_floats_are_integers(live: LiveServer) -> None:
    reply = live.generate(
        num_images=2.0, seed=7.0, num_inference_steps=1.0, image_size={"width": 512.0, "height": 544.0}
    )
    assert reply.status_code == 201
    assert [(item["width"], item["height"]) for item in reply.json()["data"]] == [(512, 544)] * 2
    assert '"seed":7,' in reply.text.replace(" ", "")


def test_image_i_is_the_image_of_seed_plus_i(live: LiveServer) -> None:
    seed = 2**32 - 2  # the generator's own seeds end on the way
    asked = {"output_format": "png", "response_format": "b64_json"}
    several = live.generate(seed=seed, num_images=4, **asked).json()
    singles = [live.generate(seed=seed + index, **asked).json() for index in range(4)]
    assert [item["b64_json"] for item in several["images"]] == [single["images"][0]["b64_json"] for single in singles]
    assert len({item["b64_json"] for item in several["images"]}) == 4
    assert [several["seed"], *(single["seed"] for single in singles)] == [seed, *range(seed, seed + 4)]


def test_the_last_seed_has_room_for_four_images(live: LiveServer) -> None:
    reply = live.generate(seed=2**63 - 1, num_images=4)
    assert (reply.status_code, reply.json()["seed"], len(reply.json()["images"])) == (201, 2**63 - 1, 4)


@pytest.mark.parametrize(
    ("fields", "place", "format"),
    [
        ({}, "url", "JPEG"),
        ({"output_format": "png"}, "url", "PNG"),
        ({"output_format": "webp"}, "url", "WEBP"),
        ({"sync_mode": True}, "data", "JPEG"),
        ({"sync_mode": True, "output_format": "png"}, "data", "PNG"),
        ({"response_format": "b64_json"}, "b64_json", "JPEG"),
        ({"response_format": "b64_json", "sync_mode": True, "output_format": "png"}, "b64_json", "PNG"),
        ({"output_format": "b64_json"}, "b64_json", "JPEG"),
        ({"extra_body": {"response_format": "b64_json"}}, "b64_json", "JPEG"),
        ({"response_format": "url", "output_format": "url"}, "url", "JPEG"),
    ],
)
def test_where_the_image_is(live: LiveServer, fields: dict[str, Any], place: str, format: str) -> None:
    reply = live.generate(**fields)
    body = reply.json()
    assert reply.status_code == 201
    assert body["images"] == body["data"]
    (item,) = body["images"]
    type_ = f"image/{format.lower()}"
    assert item.keys() == {"b64_json" if place == "b64_json" else "url", "width", "height", "content_type"}
    if place == "url":
        served = call(live, "GET", item["url"])
        assert served.headers["content-type"] == type_
        data = served.content
    elif place == "data":
        prefix, _, encoded = item["url"].partition(",")
        assert prefix == f"data:{type_};base64"
        data = base64.b64decode(encoded, validate=True)
    else:
        data = base64.b64decode(item["b64_json"], validate=True)
    picture = Image.open(io.BytesIO(data))
    assert (picture.format, picture.size, item["content_type"]) == (format, (512, 512), type_)
    assert ":null" not in reply.text


@pytest.mark.parametrize(
    ("width", "height", "count", "megapixels"),
    [(512, 512, 1, 1), (512, 512, 3, 3), (1024, 1024, 1, 1), (1056, 1024, 1, 2), (1536, 1536, 1, 3)],
)
def test_the_price(live: LiveServer, width: int, height: int, count: int, megapixels: int) -> None:
    reply = live.generate(image_size={"width": width, "height": height}, num_images=count)
    price, dollars = 52500 * megapixels, 0.02625 * megapixels
    usage = reply.json()["meta"]["usage"]
    assert (usage["tokens_used"], usage["credits_used"], usage["usd_spent"]) == (
        price,
        price,
        pytest.approx(dollars),
    )
    assert reply.headers["x-aimlapi-credits-used"] == str(price)
    assert float(reply.headers["x-aimlapi-usd-spent"]) == pytest.approx(dollars)


def test_every_field_and_header_of_a_reply(live: LiveServer) -> None:
    prompt = 'a "quoted"\nprompt \U0001f600 </script>'
    reply = live.generate(prompt=prompt, num_images=2)
    body = reply.json()
    assert body.keys() >= {"images", "timings", "seed", "has_nsfw_concepts", "prompt", "data", "meta", "created"}
    assert body["prompt"] == prompt
    assert body["has_nsfw_concepts"] == [False, False]
    assert body["timings"].keys() >= {"inference", "queue", "text", "denoise", "decode", "encode"}
    assert abs(body["created"] - time.time()) < 3600
    assert reply.headers["x-served-model"] != "flux/srpo"
    assert reply.headers.keys() >= {"x-request-id", "x-inference-id", "x-engine-fingerprint"}


@pytest.mark.parametrize(("sent", "back"), [("aZ09._:-", True), ("a b", False)])
def test_a_valid_client_request_id_comes_back_with_an_error_too(live: LiveServer, sent: str, back: bool) -> None:
    """`test_fuzz` has more of them, with a reply that is none."""
    reply = call(live, "GET", "/nowhere", headers={"X-Client-Request-Id": sent})
    assert reply.headers.get("x-client-request-id") == (sent if back else None)
    assert reply.headers["x-request-id"] != reply.headers["x-inference-id"]


def test_settings_change_status_price_and_urls(tuned: LiveServer) -> None:
    reply = tuned.generate()
    body = reply.json()
    assert (reply.status_code, body["meta"]["usage"]["usd_spent"], reply.headers["x-aimlapi-usd-spent"]) == (
        200,
        0,
        "0",
    )
    url = body["images"][0]["url"]
    assert url.startswith("https://images.example/base/files/")
    assert call(tuned, "GET", f"/files/{url.rpartition('/')[2]}").status_code in (200, 410)


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_image_url(live: LiveServer, image: dict[str, Any]) -> None:
    url = urlsplit(image["url"])
    assert (url.scheme, url.netloc) == ("http", f"127.0.0.1:{live.port}")
    assert re.fullmatch(r"/files/[A-Za-z0-9_-]{32,}\.png", url.path)  # 192 bits, most of them random
    assert live.generate().json()["images"][0]["url"].endswith(".jpeg")
    again = call(live, "POST", PATH, json=BODY, headers={"host": f"localhost:{live.port}"}).json()["images"][0]["url"]
    assert again.startswith(f"http://localhost:{live.port}/files/")


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer anything"}, {"authorization": "Basic eA=="}, FOREIGN, {"accept": "text/html"}],
)
def test_a_file_needs_no_key_and_minds_none(live: LiveServer, image: dict[str, Any], headers: dict[str, str]) -> None:
    reply = call(live, "GET", image["url"], headers=headers)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
    assert reply.headers["access-control-allow-origin"] == "*"
    assert "max-age=" in reply.headers["cache-control"]
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_head_ranges_and_conditions(live: LiveServer, image: dict[str, Any]) -> None:
    url = image["url"]
    whole = call(live, "GET", url)
    size, etag = len(whole.content), whole.headers["etag"]
    head = call(live, "HEAD", url)
    assert (head.status_code, head.content, int(head.headers["content-length"])) == (200, b"", size)
    assert head.headers["etag"] == etag
    for asked, (start, end) in {
        "bytes=0-9": (0, 10), "bytes=10-": (10, size), "bytes=-10": (size - 10, size), "bytes=0-999999999": (0, size),
    }.items():  # fmt: skip
        part = call(live, "GET", url, headers={"range": asked})
        assert (part.status_code, part.content) == (206, whole.content[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for ignored in ("bytes=0-1,4-5", "lines=0-1", "bytes=-", "bytes"):
        assert call(live, "GET", url, headers={"range": ignored}).status_code == 200
    for beyond in (f"bytes={size}-", "bytes=-0"):
        reply = call(live, "GET", url, headers={"range": beyond})
        refused(reply, 416, "range_not_satisfiable")
        assert reply.headers["content-range"] == f"bytes */{size}"
    assert call(live, "GET", url, headers={"range": "bytes=0-9", "if-range": '"other"'}).status_code == 200
    for match in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        reply = call(live, "GET", url, headers={"if-none-match": match})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", etag)
    assert call(live, "GET", url, headers={"if-none-match": '"other"'}).status_code == 200


@direct  # a proxy answers some of them itself
@pytest.mark.parametrize("path", ["/v1/jobs/%00", "/v1/jobs?after=%00", "/files/%00.png", "/%00"])
def test_a_null_character_is_in_no_address(live: LiveServer, path: str) -> None:
    assert httpx.get(live.url + path).status_code == 404


@direct
def test_unknown_files_are_404(live: LiveServer, image: dict[str, Any]) -> None:
    name = image["url"].rpartition("/")[2]
    other = ("A" if name[0] != "A" else "B") + name[1:]
    for path in (
        other,
        "x",
        name + "x",
        name.removesuffix(".png"),
        "..%2fimages.key",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "é",
    ):
        reply = call(live, "GET", f"/files/{path}")
        refused(reply, 404, "not_found")
        assert reply.headers["access-control-allow-origin"] == "*"
    assert call(live, "HEAD", f"/files/{other}").status_code == 404


@direct
def test_expired_files_are_410(live: LiveServer, tuned: LiveServer) -> None:
    url = live.generate().json()["images"][0]["url"]
    (file,) = live.data_dir.rglob(url.rpartition("/")[2])
    os.utime(file, (0, 0))
    refused(call(live, "GET", url), 410, "expired")
    file.unlink()
    refused(call(live, "GET", url), 410, "expired")
    path = f"/files/{tuned.generate().json()['images'][0]['url'].rpartition('/')[2]}"  # kept for a second
    for _ in range(600):
        if (reply := call(tuned, "GET", path)).status_code != 200:
            break
        time.sleep(0.1)
    refused(reply, 410, "expired")


# --- hosts and origins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("localhost", True), ("LOCALHOST:80", True), ("127.0.0.1:8000", True), ("[::1]:8000", True),
        ("elsewhere.example", False), ("127.0.0.1.elsewhere.example", False), ("127.0.0.1:80@elsewhere.example", False),
        ("[::1]elsewhere.example", False), pytest.param("localhost/x", False, marks=direct),
        pytest.param("", False, marks=direct), ("images.example", False),
    ],
)  # fmt: skip
def test_only_its_own_names_are_served_on_loopback(live: LiveServer, host: str, served: bool) -> None:
    reply = call(live, "GET", "/v1/models", headers={"host": host})
    if served:
        assert reply.status_code == 200
    else:
        refused(reply, 400, "unknown_host")


@direct
def test_the_public_url_is_a_name_too_and_no_host_is_none(live: LiveServer, tuned: LiveServer) -> None:
    assert call(tuned, "GET", "/health", headers={"host": "Images.example"}).status_code == 200
    assert exchange(live.port, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "null", "http://127.0.0.1:1", "file://"])
def test_without_keys_foreign_pages_may_not_post(live: LiveServer, origin: str) -> None:
    reply = call(live, "POST", PATH, json=BODY, headers={"origin": origin})
    refused(reply, 403, "foreign_origin")
    assert "access-control-allow-origin" not in reply.headers
    for method, path in (("GET", "/v1/models"), ("OPTIONS", PATH)):
        reply = call(live, method, path, headers={"origin": origin, "access-control-request-method": "POST"})
        assert reply.is_success
        assert "access-control-allow-origin" not in reply.headers


def test_without_keys_its_own_pages_may_post(live: LiveServer, tuned: LiveServer) -> None:
    for server, origin in ((live, live.url), (tuned, "https://images.example")):
        reply = call(server, "POST", PATH, json={}, headers={"origin": origin})
        refused(reply, 400, None, "model")
        assert reply.headers["access-control-allow-origin"] == origin
        assert "origin" in reply.headers["vary"].lower()


def test_with_keys_any_page_may_call(live_with_key: LiveServer) -> None:
    asked = "authorization,content-type,x-stainless-os,x-anything"
    reply = call(
        live_with_key,
        "OPTIONS",
        PATH,
        headers=FOREIGN | {"access-control-request-method": "POST", "access-control-request-headers": asked},
    )
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-headers"] == asked
    assert {"GET", "POST", "DELETE", "HEAD", "OPTIONS"} <= set(
        reply.headers["access-control-allow-methods"].split(", ")
    )
    with live_with_key.client(headers=FOREIGN) as client:
        replies = [
            client.get("/v1/models"), client.get("/nowhere"), client.get(PATH), client.post(PATH, json=BODY),
            client.post(PATH, json={}, headers=KEY), client.post(PATH, json=BODY, headers=KEY),
        ]  # fmt: skip
    assert [reply.status_code for reply in replies] == [200, 404, 405, 401, 400, 201]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == "*"
        exposed = reply.headers["access-control-expose-headers"]
        assert set(exposed.split(", ")) >= {*EXPOSED, "retry-after", "retry-after-ms", "x-ignored-fields"}


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        None, "", "Bearer", "Bearer wrong-key", "secret-key-1", "Basic secret-key-1", "Bearer secret-key-1x",
        "Bearer Secret-Key-1", "Bearer secret-key-1 more", "Bearer secret-key-1,secret-key-2",
        b"Bearer secret-key-1\xff", b"Bearer \xd0\xba\xd0\xbb", "Bearer None", "Bearer " + "x" * 10_000,
    ],
)  # fmt: skip
def test_without_a_valid_key_it_is_a_401(live_with_key: LiveServer, sent: Any) -> None:
    headers = {} if sent is None else {"authorization": sent}
    for path in PATHS:
        reply = call(live_with_key, "POST", path, content=b"not even JSON", headers=headers)
        error = refused(reply, 401, "invalid_api_key")
        assert (error["type"], reply.headers["www-authenticate"]) == ("authentication_error", "Bearer")
        assert "secret-key" not in reply.text


@pytest.mark.parametrize(
    "sent", ["Bearer secret-key-1", "bearer secret-key-1", "BEARER  secret-key-2", "Bearer secret-key-2"]
)
def test_any_of_the_keys_is_taken(live_with_key: LiveServer, sent: str) -> None:
    refused(call(live_with_key, "POST", PATH, json={}, headers={"authorization": sent}), 400, None, "model")


def test_what_needs_no_key(live_with_key: LiveServer) -> None:
    for path in ("/v1/models", "/models", "/v1/models/flux/srpo", "/health", "/ready"):
        assert call(live_with_key, "GET", path).status_code == 200
    url = call(live_with_key, "POST", PATH, json=BODY, headers=KEY).json()["images"][0]["url"]
    assert [
        call(live_with_key, "GET", url).status_code,
        call(live_with_key, "GET", url, headers={"authorization": "Bearer wrong"}).status_code,
    ] == [
        200,
        200,
    ]


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_list_of_models(live: LiveServer) -> None:
    listed = call(live, "GET", "/v1/models").json()
    for path in ("/models", "/models/", "/v1/models/"):
        assert listed == call(live, "GET", path).json()
    for path in ("/v1/models", "/v1/models/flux/srpo"):
        looked_at = call(live, "HEAD", path)
        assert (looked_at.status_code, looked_at.content) == (200, b"")
    assert listed["object"] == "list"
    assert "flux/srpo" in [model["id"] for model in listed["data"]]
    for model in listed["data"]:
        assert (model["object"], model["type"], type(model["info"]["name"])) == ("model", "image", str)
        for path in (model["id"], model["id"].replace("/", "%2F")):
            assert call(live, "GET", f"/v1/models/{path}").json() == model
            assert call(live, "GET", f"/models/{path}").json() == model


# --- the line, crashes, the log --------------------------------------------------------------------------------------


def test_a_full_line_says_when_to_come_back(tuned: LiveServer) -> None:
    """One is drawn, one waits, and of the others each is refused: none of them waits for long, none gets lost."""
    with ThreadPoolExecutor(12) as threads:
        large = {"image_size": {"width": 1024, "height": 1024}, "num_inference_steps": 4}
        replies = list(threads.map(lambda _: tuned.generate(**large), range(12)))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    for reply in replies:
        if reply.status_code == 429:
            error = refused(reply, 429, "queue_full")
            assert error["type"] == "rate_limit_error"
            assert 1 <= int(reply.headers["retry-after"]) <= 120
            milliseconds = int(reply.headers["retry-after-ms"])
            assert 1000 <= milliseconds <= 120_000
            assert (
                (int(reply.headers["retry-after"]) - 1) * 1000
                < milliseconds
                <= int(reply.headers["retry-after"]) * 1000
            )


def post_to_broken(folder: Path, failure: Exception) -> httpx.Response:
    """The reply of a server whose pool takes nothing, but raises `failure`."""
    settings = Settings(data_dir=folder, model="tiny")

    def fail(_: ImageRequest) -> NoReturn:
        raise failure

    pool = InstantPool(build_engine_config(settings), fail)

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(settings, pool))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(PATH, json=BODY)

    return asyncio.run(post())


def test_a_crash_tells_the_client_nothing_and_the_log_everything(tmp_path: Path) -> None:
    with capture_logs() as entries:
        reply = post_to_broken(tmp_path, RuntimeError("secret /path"))
    error = refused(reply, 500, "internal_error")
    assert error["name"] == "InternalError"
    assert not re.search("secret|path/|Runtime|Traceback", reply.text.replace('"path"', ""))
    (entry,) = [entry for entry in entries if entry["log_level"] == "error"]
    assert entry["request_id"] == reply.json()["requestId"]
    assert str(entry["exc_info"]) == "secret /path"


@pytest.mark.parametrize(("wait", "seconds", "milliseconds"), [(0.01, 1, 1000), (7.25, 8, 7250), (9999.0, 60, 60_000)])
def test_when_to_come_back_is_bounded(tmp_path: Path, wait: float, seconds: int, milliseconds: int) -> None:
    reply = post_to_broken(tmp_path, QueueFull(3, 1, wait))
    refused(reply, 429, "queue_full")
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == (str(seconds), str(milliseconds))


CRASH = """
import os, structlog
from server import logs
from server.settings.server import Settings
logs.configure(Settings())
def draw(prompt):
    raise RuntimeError("a bug")
try:
    draw(os.environ["PROMPT"])
except RuntimeError:
    structlog.get_logger("srpo").exception("request")
"""


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_traceback_in_the_log_shows_no_values(format: str) -> None:
    env = os.environ | {"SRPO_LOG_FORMAT": format, "PROMPT": "CANARY-7f3a"}
    done = subprocess.run([sys.executable, "-c", CRASH], env=env, capture_output=True, text=True, check=True)
    assert "RuntimeError: a bug" in done.stderr
    assert "CANARY" not in done.stderr


@direct
@pytest.mark.parametrize("log", ["live", "tuned"], ids=["json", "console"])
def test_no_prompt_and_no_forged_line_in_the_log(request: pytest.FixtureRequest, log: str) -> None:
    server: LiveServer = request.getfixturevalue(log)
    canary = "CANARY-7f3a"
    server.generate(prompt=canary)
    server.generate(prompt=canary, seed=canary, image_size=canary, unknown=canary)
    call(server, "POST", PATH, content=f'{{"prompt": "{canary}"', headers=JSON)
    call(
        server,
        "GET",
        "/x%0d%0aFORGED%1b[31m%00%e2%80%ae",
        headers={"x-client-request-id": canary, "user-agent": canary},
    )
    exchange(
        server.port, b"GET /%0aFORGED HTTP/1.1\r\nHost: localhost\r\nX-A: \x1b[31mFORGED\r\nConnection: close\r\n\r\n"
    )
    text = server.settled_log()
    assert canary not in text
    assert "FORGED" in text
    assert not [line for line in text.splitlines() if line.startswith("FORGED")]
    assert "\x1b[31mFORGED" not in text
    assert "FORGED\x1b" not in text
