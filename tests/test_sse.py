"""Streams on a real port: the real SDKs, every event's words, errors inside, and readers that hang or leave."""

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.node import ask
from support.pictures import open_image
from support.scripted_server import Gate, Scripted
from support.server import PROMPT, START_LIMIT, LiveServer

PATH = "/v1/images/generations"
BODY: dict[str, Any] = {
    "model": "flux/srpo", "prompt": PROMPT, "image_size": "square", "num_inference_steps": 6, "seed": 7, "stream": True,
}  # fmt: skip
EXTRA = {"image_size": "square", "num_inference_steps": 6, "seed": 7}
NAMES = [f"image_generation.{name}" for name in ("partial_image", "partial_image", "completed")]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with Scripted(tmp_path_factory.mktemp("scripted"), safety_checker="none") as server:
            yield server


def read(server: Any, headers: dict[str, str] | None = None, **fields: Any) -> tuple[httpx.Response, list[Any]]:
    """The reply, and its events as (name, data); comments have the name ''."""
    headers = {"accept": "text/event-stream"} if headers is None else headers
    reply = httpx.post(server.url + PATH, json=BODY | fields, headers=headers, timeout=START_LIMIT)
    return reply, [parse(block) for block in reply.text.split("\n\n") if block]


def parse(block: str) -> tuple[str, Any]:
    if block.startswith(":"):
        return "", block
    lines = dict(line.split(": ", 1) for line in block.split("\n"))
    assert set(lines) == {"event", "data"}
    return lines["event"], json.loads(lines["data"])


def test_openai_streams_previews_and_the_image_of_the_plain_reply(live: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused") as client:
        stream = client.images.generate(
            model="flux/srpo", prompt=PROMPT, stream=True, partial_images=2, extra_body=EXTRA
        )
        events: list[Any] = list(stream)
        assert [event.type for event in events] == NAMES
        assert [event.partial_image_index for event in events[:2]] == [0, 1]
        assert open_image(base64.b64decode(events[0].b64_json)).size == (32, 32)
        plain = client.images.generate(model="flux/srpo", prompt=PROMPT, response_format="b64_json", extra_body=EXTRA)
    assert plain.data is not None
    assert events[-1].b64_json == plain.data[0].b64_json
    assert httpx.get(events[-1].url).content == base64.b64decode(events[-1].b64_json)
    assert events[-1].size == "512x512"
    assert events[-1].usage.total_tokens == 52500


def test_openai_streams_on_node(live: LiveServer, clients: str) -> None:
    fields: dict[str, Any] = {"model": "flux/srpo", "prompt": PROMPT, "partial_images": 2} | EXTRA
    events = ask(clients, "stream", f"{live.url}/v1", **fields)["images"]
    assert [event["type"] for event in events] == NAMES
    assert [event.get("index") for event in events] == [0, 1, None]
    assert [open_image(base64.b64decode(event["b64"])).size for event in events] == [(32, 32)] * 2 + [(512, 512)]


def test_every_step_and_stage_is_told_in_order(live: LiveServer) -> None:
    reply, events = read(live, num_images=2, partial_images=1, response_format="url")
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["x-engine-fingerprint"]
    told = [data for name, data in events if name == "image_generation.progress"]
    assert [(data["stage"], data["image_index"], data["step"]) for data in told if data["stage"] == "denoise"] == [
        ("denoise", image, step) for image in (0, 1) for step in range(1, 7)
    ]
    stages = list(dict.fromkeys(data["stage"] for data in told))
    assert [stage for stage in stages if stage != "queued"] == ["text", "denoise", "decode", "safety", "encode"]
    assert all(data["steps"] == 6 and data["num_images"] == 2 for data in told if data["stage"] != "queued")
    assert told[-1]["eta_seconds"] == 0
    previews = [data for name, data in events if name == "image_generation.partial_image"]
    assert [(data["image_index"], data["partial_image_index"]) for data in previews] == [(0, 0), (1, 0)]
    done = [data for name, data in events if name == "image_generation.completed"]
    assert [(data["image_index"], data["seed"], data["has_nsfw_concepts"]) for data in done] == [
        (0, 7, False),
        (1, 8, False),
    ]
    assert events[-1][1]["image_index"] == 1
    assert all(data["type"] == name for name, data in events)


SDK = {"x-stainless-lang": "ruby"}


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"accept": "text/event-stream"}, True),
        ({"accept": "text/event-stream, application/json"}, True),
        ({"accept": "text/event-stream"} | SDK, False),  # OpenAI's SDKs for Ruby and Java
        ({"accept": "application/json"} | SDK, False),  # for Python, JavaScript and Go
        ({"accept": "*/*"}, True),  # curl, httpx
        ({"accept": "*/*", "user-agent": "GuzzleHttp/7"}, False),  # SDKs for PHP
        ({"accept": "*/*", "user-agent": ""}, False),  # and Rust
    ],
)
def test_progress_is_a_comment_for_those_who_may_not_know_it(
    scripted: Scripted, headers: dict[str, str], named: bool
) -> None:
    _, events = read(scripted, headers, prompt="quick")
    progress = [data for name, data in events if name == "image_generation.progress"]
    comments = [text for name, text in events if not name]
    assert (bool(progress), bool(comments)) == (named, not named)
    told = progress or [json.loads(text.removeprefix(": progress ")) for text in comments]
    assert {data["step"] for data in told} == set(range(7))


@pytest.mark.parametrize(("asked", "sent", "ignored"), [(0, 0, False), (3, 3, False), (9, 0, True)])
def test_partial_images(scripted: Scripted, asked: int, sent: int, ignored: bool) -> None:
    reply, events = read(scripted, prompt="quick", partial_images=asked)
    assert [name for name, _ in events].count("image_generation.partial_image") == sent
    assert ("partial_images" in reply.headers["x-ignored-fields"]) == ignored


def previews(server: Scripted, wanted: bool) -> list[int]:
    """The sides of those of one image, whose check is wanted or not."""
    _, events = read(server, prompt="quick", partial_images=1, enable_safety_checker=wanted)
    return [data["width"] for name, data in events if name == "image_generation.partial_image"]


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        ({}, {True: [32], False: [192]}),
        ({"safety_policy": "always"}, {False: [32]}),
        ({"safety_action": "flag"}, {True: [192]}),
        ({"previews": "sharp"}, {True: [192]}),
        ({"previews": "none"}, {False: []}),
    ],
    ids=str,
)
def test_what_may_be_withheld_is_only_shown_as_a_thumbnail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sides: dict[bool, list[int]]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Scripted(tmp_path, **options) as server:
        assert {wanted: previews(server, wanted) for wanted in sides} == sides


def test_without_a_checker_there_is_nothing_to_withhold(scripted: Scripted) -> None:
    assert previews(scripted, True) == [192]


def test_what_is_wrong_before_the_stream_is_a_plain_error(scripted: Scripted) -> None:
    reply = httpx.post(scripted.url + PATH, json=BODY | {"num_inference_steps": 99})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "num_inference_steps"


def test_an_error_inside_the_stream_is_raised_by_openai(scripted: Scripted) -> None:
    _, events = read(scripted, prompt="oom")
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["code"] == "out_of_memory"
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="unused") as client:
        stream = client.images.generate(model="flux/srpo", prompt="oom", stream=True, extra_body=EXTRA)
        with pytest.raises(openai.APIError, match="does not fit the device's memory"):
            list(stream)


def test_an_error_inside_the_stream_is_raised_on_node(scripted: Scripted, clients: str) -> None:
    error = ask(clients, "stream", f"{scripted.url}/v1", **{**BODY, "prompt": "oom"})["error"]
    assert "does not fit the device's memory" in error["message"]


def test_a_reader_that_leaves_stops_its_work(scripted: Scripted, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with httpx.stream("POST", scripted.url + PATH, json=BODY | {"prompt": gate.prompt}) as reply:
        lines = reply.iter_lines()  # held: a generator that is dropped closes the reply
        next(lines)
        scripted.until(lambda: scripted.pool.status().running == 1)
    scripted.until(lambda: scripted.pool.status().running == 0)
    gate.allow(100)


@asynccontextmanager
async def hanging(server: Scripted, count: int, *, leave: bool) -> AsyncIterator[None]:
    """Readers that send their request and read nothing; some leave at once."""
    body = json.dumps(BODY | {"prompt": "quick", "partial_images": 3, "image_size": "square_hd"}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(head.encode() + b"\r\n\r\n" + body)
            if leave:
                await asyncio.to_thread(sock.recv, 1)
                sock.close()
        yield


async def test_readers_that_hang_or_leave_cost_the_others_nothing(scripted: Scripted) -> None:
    """100 readers: 30 never read, 30 leave in the middle, 40 get everything."""

    async def whole(client: httpx.AsyncClient) -> list[str]:
        reply = await client.post(scripted.url + PATH, json=BODY | {"prompt": "quick", "partial_images": 3})
        return [parse(block)[0] for block in reply.text.split("\n\n") if block]

    async with hanging(scripted, 30, leave=False), hanging(scripted, 30, leave=True):
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(timeout=START_LIMIT, limits=limits) as client:
            everything = await asyncio.gather(*(whole(client) for _ in range(40)))
        for names in everything:
            assert names.count("image_generation.partial_image") == 3
            assert names[-1] == "image_generation.completed"
        await asyncio.to_thread(scripted.until, lambda: scripted.pool.status().running == 0)
        assert scripted.pool.status().restarts == 0
        assert scripted.in_flight == 0  # although 30 readers still hang
        assert (await asyncio.to_thread(read, scripted, prompt="quick"))[1][-1][0] == "image_generation.completed"


@contextmanager
def left_plain(server: Scripted, body: dict[str, Any]) -> Iterator[None]:
    """A plain request, whose client goes away at the end."""
    data = json.dumps(body | {"stream": False}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head.encode() + b"\r\n\r\n" + data)
        yield


@contextmanager
def left_stream(server: Scripted, body: dict[str, Any]) -> Iterator[None]:
    with httpx.stream("POST", server.url + PATH, json=body, timeout=START_LIMIT):
        yield


@contextmanager
def cancelled_job(server: Scripted, body: dict[str, Any]) -> Iterator[None]:
    job = httpx.post(server.url + PATH, json=body, headers={"prefer": "respond-async"}).json()
    yield
    for _ in range(2):
        assert httpx.delete(job["poll_url"]).json()["status"] == "cancelled"


@pytest.mark.parametrize("asked", [left_plain, left_stream, cancelled_job])
@pytest.mark.parametrize("done", range(4))
def test_a_cancelled_request_begins_no_further_step(scripted: Scripted, tmp_path: Path, asked: Any, done: int) -> None:
    """After any number of steps, on every road: the step in progress is the last."""
    gate = Gate(tmp_path / "gate")
    gate.allow(done)
    with asked(scripted, BODY | {"prompt": gate.prompt, "num_inference_steps": 4}):
        scripted.until(lambda: gate.begun == done + 1)
    scripted.until(lambda: scripted.pool.status().running == 0)
    gate.allow(100)
    assert read(scripted, prompt="quick")[1][-1][0] == "image_generation.completed"  # the worker has gone on
    assert gate.begun == done + 1
    assert scripted.in_flight == 0
