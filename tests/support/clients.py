"""What the tests of real clients share: the published examples, and a server that fails on demand."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import urlsplit

import openai
import pytest
import requests
import uvicorn
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs
from support.pictures import open_image
from support.server import PROMPT, START_LIMIT, LiveServer, free_port

from bench.support.instant import InstantPool
from pipelines import errors
from pipelines.request import ImageRequest
from server.app import create_app
from server.engine_setup import build_engine_config
from server.settings.server import Settings

KEY = "secret-key-1"


HOST = "https://api.aimlapi.com"


KEY_MARK = "<YOUR_AIMLAPI_KEY>"


SMALL: dict[str, Any] = {"image_size": "square", "num_inference_steps": 1}  # where the size is not the point


def run_example(server: LiveServer, *command: str, stdin: str | None = None) -> str:
    """Run a published example, its last argument the code, against `server`: what it prints."""
    *program, code = command
    code = code.replace(HOST, server.url).replace(KEY_MARK, KEY)
    ended = subprocess.run([*program, code], input=stdin, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def check_published_reply(reply: dict[str, Any], server: LiveServer, width: int, height: int) -> None:
    """Every field of the published reply, of its type; the image behind its URL, which is on the API's host."""
    (item,) = reply["images"]
    assert reply["data"] == reply["images"]
    assert (item["width"], item["height"], item["content_type"]) == (width, height, "image/jpeg")
    assert type(reply["timings"]["inference"]) is float
    assert type(reply["seed"]) is int
    assert reply["has_nsfw_concepts"] == [False]
    assert reply["prompt"] == PROMPT
    assert reply["meta"]["usage"]["tokens_used"] == 52500
    assert urlsplit(item["url"]).netloc == f"127.0.0.1:{server.port}"
    assert urlsplit(item["url"]).path.endswith(".jpeg")
    file = requests.get(item["url"], timeout=60)
    assert file.headers["content-type"] == "image/jpeg"
    image = open_image(file.content)
    assert (image.format, image.size) == ("JPEG", (width, height))


def statuses(server: LiveServer, path: str = "/v1/images/generations") -> list[int]:
    """The status of every answered request for `path`, as the server's log has them."""
    lines = [json.loads(line) for line in server.settled_log().splitlines() if line.startswith("{")]
    return [line["status"] for line in lines if line.get("event") == "request" and line["path"] == path]


FAULTS: dict[str, Callable[[], Exception]] = {
    "full": lambda: errors.QueueFull(3, 1, 1.2),
    "failed": errors.GenerationFailed,
    "memory": errors.OutOfMemory,
    "bug": lambda: RuntimeError("a secret"),
    "loading": lambda: errors.NotReady("reading", 0.4, 1.2),
    "late": lambda: errors.DeadlineExceeded(9),
}


def fail_as_prompted(request: ImageRequest) -> NoReturn:
    raise FAULTS[request.prompt]()


@dataclass
class Failing:
    """A server that takes `KEY` and fails; it counts the requests and remembers when each came."""

    url: str
    arrivals: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def failing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failing]:
    port = free_port()
    server = Failing(f"http://127.0.0.1:{port}")
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("failing"), model="tiny", api_keys=(KEY,), max_body=2**12, port=port
    )
    app = create_app(settings, InstantPool(build_engine_config(settings), fail_as_prompted))

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            server.arrivals.append(time.monotonic())
        await app(scope, receive, send)

    uvicorn_server = uvicorn.Server(uvicorn.Config(counted, port=port, log_config=None, ws="none"))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    deadline = time.monotonic() + START_LIMIT
    while not uvicorn_server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    with capture_logs():  # a crash's traceback would go to the screen
        yield server
    uvicorn_server.should_exit = True
    thread.join()


@pytest.fixture
def failing(failing_server: Failing) -> Failing:
    failing_server.arrivals.clear()
    return failing_server


@dataclass(frozen=True)
class Failure:
    """A request that fails, and what a client must show of it. `tries`: with one retry allowed."""

    status: int
    type: type[openai.APIStatusError]
    message: str
    fields: dict[str, Any]
    key: str = KEY
    tries: int = 1


INTERNAL = openai.InternalServerError


FAILURES = {
    "bad field": Failure(
        400,
        openai.BadRequestError,
        "image_size.width: expected a multiple of 32 from 512 to 1536, received 1000",
        {"image_size": {"width": 1000}},
    ),
    "unknown model": Failure(400, openai.BadRequestError, "model: ", {"model": "dall-e-9"}),
    "wrong key": Failure(401, openai.AuthenticationError, "This request requires a valid API key.", {}, key="wrong"),
    "too large": Failure(413, openai.APIStatusError, "larger than 4,096 bytes", {"padding": "x" * 5000}),
    "queue full": Failure(429, openai.RateLimitError, "The queue is full: 3", {"prompt": "full"}, tries=2),
    "failed": Failure(500, INTERNAL, "The image could not be generated.", {"prompt": "failed"}),
    "out of memory": Failure(500, INTERNAL, "does not fit the device's memory", {"prompt": "memory"}),
    "bug": Failure(500, INTERNAL, "Something went wrong in the server.", {"prompt": "bug"}, tries=2),
    "loading": Failure(503, INTERNAL, "not ready yet: reading, 40% done", {"prompt": "loading"}, tries=2),
    "late": Failure(504, INTERNAL, "did not finish within 9 s", {"prompt": "late"}),
}


each_failure = pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)


def body_of(failure: Failure) -> dict[str, Any]:
    return {"model": "flux/srpo", "prompt": PROMPT} | failure.fields
