"""flux/srpo/image-to-image over HTTP: bit-equality, the contract's words, what is not fetched, jobs and streams."""

import base64
import io
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image
from support.img2img import BODY, FILE, MODEL, PATH, PICTURE, PIXELS, peak, picture, post, uri
from support.jobs import PREFER, ended, events_of
from support.pictures import INWARD, Peer
from support.scripted_server import Gate, Scripted
from support.server import PROMPT, START_LIMIT, LiveServer
from support.strangers import Leaver

from server.images import fetch
from server.images.metadata import read_marks
from weights import tiny


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """Its engine returns the source picture as it came."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with Scripted(tmp_path_factory.mktemp("image-to-image"), safety_checker="none") as scripted:
            yield scripted


def refused(reply: httpx.Response, code: str = "unusable_image") -> str:
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, "image_url", code), reply.text
    for issue in error["data"]:
        assert len(issue["received"]) <= 80
    return str(error["message"])


@pytest.mark.parametrize(("strength", "guidance"), [(0.7, 3.25), (1, 11.5)])
def test_the_servers_pixels_are_diffusers_own(live: LiveServer, strength: float, guidance: float) -> None:
    request: dict[str, Any] = {
        "strength": strength, "guidance_scale": guidance, "acceleration": "none", "prompt": PROMPT, "seed": 99,
    }  # fmt: skip
    pipeline = FluxImg2ImgPipeline(**tiny.build(torch.float32).components)
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline(
        PROMPT,
        image=PICTURE,
        width=544,
        height=512,
        strength=strength,
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=tiny.TEXT_TOKENS,
        generator=torch.Generator().manual_seed(99),
    ).images[0]
    assert picture(post(live, **request)).tobytes() == reference.tobytes()


def test_the_defaults_are_the_published_ones_and_the_file_tells_them(server: Scripted) -> None:
    made = picture(post(server, num_inference_steps=None))
    assert made.tobytes() == PIXELS.tobytes()
    marks = read_marks(made)
    assert marks.says_ai
    assert marks.parameters is not None
    assert {"Steps: 40", "Denoising strength: 0.95", "Size: 544x512"} <= set(
        marks.parameters.split("\n")[1].split(", ")
    )


def test_the_published_schema_is_ours(server: Scripted) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    content = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]
    [schema] = [one for one in content["schema"]["oneOf"] if one["properties"]["model"]["enum"] == [MODEL]]
    assert set(schema["required"]) == {"model", "prompt", "image_url"}
    properties = schema["properties"]
    assert "image_size" not in properties
    assert properties["image_url"]["format"] == "uri"
    strength = {name: properties["strength"][name] for name in ("minimum", "maximum", "default")}
    assert strength == {"minimum": 0, "maximum": 1, "default": 0.95}
    assert properties["num_inference_steps"]["default"] == 40
    assert MODEL in [model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]]
    assert httpx.get(f"{server.url}/v1/models/{MODEL}").json()["type"] == "image"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"image_url": None}, "image_url", "required"),
        ({"image_url": 5}, "image_url", "invalid_url"),
        ({"image_url": "ftp://example.com/a.png"}, "image_url", "invalid_url"),
        ({"image_url": "a.png"}, "image_url", "invalid_url"),
        ({"image_url": "file:///etc/passwd"}, "image_url", "invalid_url"),
        ({"strength": 1.01}, "strength", "invalid_number"),
        ({"strength": -0.01}, "strength", "invalid_number"),
        ({"strength": "0.5"}, "strength", "invalid_number"),
        ({"strength": True}, "strength", "invalid_number"),
        ({"num_inference_steps": 51}, "num_inference_steps", "invalid_integer"),
    ],
)
def test_a_wrong_field_is_named(server: Scripted, fields: dict[str, Any], param: str, code: str) -> None:
    reply = post(server, **fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code)


def test_foreign_spellings_are_honoured_and_a_size_is_not_ours_to_choose(server: Scripted) -> None:
    spelled: dict[str, Any] = {
        "image_url": None, "image": uri(FILE), "prompt_strength": 0.5, "steps": 8, "num_inference_steps": None,
    }  # fmt: skip
    reply = post(server, **spelled, size="1024x1024", image_size="square", width=512)
    assert set(reply.headers["x-ignored-fields"].split(", ")) == {"size", "image_size", "width"}
    parameters = read_marks(picture(reply)).parameters or ""
    assert "Denoising strength: 0.5" in parameters
    assert "Steps: 8" in parameters
    plain = post(server, model="flux/srpo", image_size="square")
    assert plain.headers["x-ignored-fields"] == "image_url"


def test_openais_sdk_reaches_it(server: Scripted) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        extra = {"image_url": uri(FILE), "strength": 0.5, "output_format": "png"}
        reply = client.images.generate(model=MODEL, prompt="quick", response_format="b64_json", extra_body=extra)
    assert reply.data is not None
    made = Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json or "")))
    assert made.tobytes() == PIXELS.tobytes()


def test_each_image_of_several_begins_at_the_picture(live: LiveServer) -> None:
    many = post(live, num_images=2, num_inference_steps=2).json()
    single = post(live, seed=8, num_inference_steps=2).json()
    assert many["data"][1] == single["data"][0]
    assert many["data"][0] != many["data"][1]


# --- what is not fetched ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", INWARD)
def test_no_spelling_of_an_inward_address_is_connected_to(server: Scripted, host: str) -> None:
    inside = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\n\r\nsecret")
    port = inside.url.split(":")[2].split("/")[0]
    assert "cannot be used" in refused(post(server, image_url=f"http://{host}:{port}/a.png"))
    inside.close()
    assert inside.connections == 0


@pytest.mark.usefixtures("public")
def test_an_address_is_fetched_and_its_redirects_are_checked(server: Scripted, canary: Peer) -> None:
    good = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(FILE) + FILE)
    assert picture(post(server, image_url=good.url)).tobytes() == PIXELS.tobytes()
    for target, outcome in ((good.url, 201), (canary.url, 400)):
        head = f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n"
        peer = Peer("127.0.0.1", head.encode())
        assert post(server, image_url=peer.url).status_code == outcome
        peer.close()
    good.close()
    assert (good.connections, canary.connections) == (2, 0)


@pytest.mark.usefixtures("public")
def test_slow_endless_and_foreign_bodies_are_refused(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 2**20)
    for reply, drip, words in (
        (b"HTTP/1.1 200 OK\r\n\r\n", True, "larger than 1 MiB"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", False, "not a PNG, JPEG or WebP"),
        (b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", False, "its host answered 401"),
    ):
        peer = Peer("127.0.0.1", reply, drip)
        assert words in refused(post(server, image_url=peer.url))
        peer.close()
    monkeypatch.setattr(fetch, "SECONDS", 0.2)
    silent = Peer("127.0.0.1", b"", hold=True)
    assert "did not arrive" in refused(post(server, image_url=silent.url))
    silent.close()


def test_a_server_that_fetches_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canary: Peer) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Scripted(tmp_path, safety_checker="none", no_fetch=True) as server:
        assert "--no-fetch" in refused(post(server, image_url=canary.url))
        assert post(server).status_code == 201
        server.pool.drain()
        assert post(server).status_code == 503
    assert canary.connections == 0


@pytest.mark.usefixtures("public")
def test_nothing_is_fetched_for_a_request_that_cannot_be_admitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\n\r\n")
    with Scripted(tmp_path, safety_checker="none") as server:
        server.pool.drain()
        assert post(server, image_url=peer.url).status_code == 503
    peer.close()
    assert peer.connections == 0


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(
    ("fields", "headers"), [({}, {}), ({"stream": True}, {}), ({}, PREFER)], ids=["plain", "stream", "job"]
)
def test_a_client_that_leaves_ends_the_fetch_of_its_picture(
    server: Scripted, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], headers: dict[str, str]
) -> None:
    monkeypatch.setattr(fetch, "SECONDS", 10 * START_LIMIT)  # nothing else ends it
    jobs = len(httpx.get(f"{server.url}/v1/jobs").json()["data"])
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nslow", hold=True)
    leaver = Leaver(server.url + PATH, BODY | fields | {"image_url": peer.url}, headers)
    server.until(lambda: peer.heard)
    leaver.leave()
    assert peer.given_up.wait(START_LIMIT)
    peer.close()
    assert len(httpx.get(f"{server.url}/v1/jobs").json()["data"]) == jobs
    assert post(server).status_code == 201


@pytest.mark.usefixtures("public")
def test_a_request_with_a_key_fetches_on_when_its_client_leaves(server: Scripted) -> None:
    arrived = threading.Event()
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(FILE) + FILE, after=arrived)
    headers, body = {"idempotency-key": "left while it is fetched"}, BODY | {"image_url": peer.url}
    leaver = Leaver(server.url + PATH, body, headers)
    server.until(lambda: peer.heard)
    leaver.leave()
    assert post(server).status_code == 201  # the server has looked around since
    arrived.set()
    server.until(lambda: post(server, headers, **body).headers.get("idempotent-replayed") == "true")
    peer.close()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(side: int) -> bytes:
    """A black picture of `side` squared pixels, one bit each in the file, one byte in memory."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_costs_the_server_no_memory(live: LiveServer) -> None:
    bomb = png_bomb(19_712)  # 389 MB when decoded
    assert len(bomb) < 2**16
    Path(f"/proc/{live.process.pid}/clear_refs").write_text("5")
    before = peak(live.process.pid)
    assert "pixels" in refused(post(live, image_url=uri(bomb)))
    assert peak(live.process.pid) < before + 2**26


# --- jobs and streams ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("public")
def test_a_job_keeps_its_source_over_a_restart_and_then_forgets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(FILE) + FILE)
    mark, private = PIXELS[0, :32].tobytes(), peer.url.encode()
    gate = Gate(tmp_path / "gate")
    begun = {"prompt": gate.prompt, "num_inference_steps": 50, "strength": 1, "image_url": peer.url}
    kept = lambda: b"".join(file.read_bytes() for file in tmp_path.glob("jobs.sqlite3*"))  # noqa: E731
    with Scripted(tmp_path, safety_checker="none") as server:
        identity = post(server, PREFER, **begun).json()["id"]
        assert mark in kept()
        assert private not in kept()
    peer.close()
    gate.allow(200)
    with Scripted(tmp_path, safety_checker="none") as server:
        done = ended(server, identity)
        assert done["model"] == MODEL
        made = Image.open(io.BytesIO(base64.b64decode(done["reply"]["data"][0]["b64_json"])))
        assert made.tobytes() == PIXELS.tobytes()
        events = events_of(httpx.get(f"{server.url}/v1/jobs/{identity}/events"))
        assert events[-1][2]["size"] == "544x512"
    assert peer.connections == 1
    assert mark not in kept()


@pytest.mark.usefixtures("public")
def test_a_replayed_request_fetches_nothing(server: Scripted) -> None:
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(FILE) + FILE)
    first, second = (post(server, {"idempotency-key": "one"}, image_url=peer.url) for _ in range(2))
    peer.close()
    assert first.content == second.content
    assert second.headers["idempotent-replayed"] == "true"
    assert peer.connections == 1


def test_a_stream_tells_the_pictures_size_and_the_steps_that_are_carried_out(server: Scripted) -> None:
    events = post(server, stream=True, partial_images=1, num_inference_steps=40, strength=0.5).text.split("\n\n")
    told = [json.loads(event.split("data: ")[1]) for event in events if "data: " in event]
    assert {event["steps"] for event in told if event.get("stage") == "denoise"} == {20}
    partial, completed = (event for event in told if "b64_json" in event)
    assert (partial["size"], completed["size"]) == ("544x512", "544x512")


@pytest.mark.parametrize("spoil", [lambda data: data[:-900], lambda _: b"GIF89a"], ids=["cut", "gif"])
def test_a_broken_picture_is_said(server: Scripted, spoil: Callable[[bytes], bytes]) -> None:
    refused(post(server, image_url=uri(spoil(FILE))))
