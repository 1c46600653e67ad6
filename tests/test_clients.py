"""Real Python clients and curl against a real loopback port: they work unmodified, and show what went wrong.

The published examples run word for word; only the host and the key are replaced.
"""

import ast
import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import requests
import uvicorn
from conftest import PROMPT, START_LIMIT, LiveServer, free_port
from PIL import Image
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from pipelines import errors
from pipelines.engine.base import EngineInfo
from pipelines.job import Job
from pipelines.request import ImageRequest
from pipelines.workers.pool import WorkerPool
from server.app import create_app
from server.settings import Settings
from server.state import build_engine_config

KEY = "secret-key-1"
HOST, KEY_MARK = "https://api.aimlapi.com", "<YOUR_AIMLAPI_KEY>"
SMALL: dict[str, Any] = {"image_size": "square", "num_inference_steps": 1}  # where the size is not the point

PYTHON_1440x512 = """import requests
import json  # for getting a structured output with indentation

def main():
    response = requests.post(
        "https://api.aimlapi.com/v1/images/generations",
        headers={
            # Insert your AIML API Key instead of <YOUR_AIMLAPI_KEY>:
            "Authorization": "Bearer <YOUR_AIMLAPI_KEY>",
            "Content-Type": "application/json",
        },
        json={
            "model": "flux/srpo",
            "prompt": "A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses.",
            "image_size": {
                "width": 1440,
                "height": 512
            }  
        }
    )

    data = response.json()
    print(json.dumps(data, indent=2, ensure_ascii=False))

if __name__ == "__main__":
    main()
"""  # noqa: W291 - word for word

PYTHON_NO_SIZE = """import requests

response = requests.post(
    "https://api.aimlapi.com/v1/images/generations",
    headers={
        "Content-Type":"application/json", 
        "Authorization":"Bearer <YOUR_AIMLAPI_KEY>",
    },
    json={
        "model":"flux/srpo",
        "prompt": "A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses."
    }
)

data = response.json()
print(data)"""  # noqa: W291 - word for word

CURL = """curl -L \\
  --request POST \\
  --url 'https://api.aimlapi.com/v1/images/generations' \\
  --header 'Authorization: Bearer <YOUR_AIMLAPI_KEY>' \\
  --header 'Content-Type: application/json' \\
  --data '{
    "model": "flux/srpo",
    "prompt": "A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses."
  }'"""


def run_example(server: LiveServer, *command: str, stdin: str | None = None) -> str:
    """Run a published example, its last argument the code, against `server`: what it prints."""
    *program, code = command
    code = code.replace(HOST, server.url).replace(KEY_MARK, KEY)
    ended = subprocess.run([*program, code], input=stdin, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def open_image(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


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


@pytest.mark.parametrize(
    ("command", "parse", "size"),
    [
        ((sys.executable, "-c", PYTHON_1440x512), json.loads, (1440, 512)),
        ((sys.executable, "-c", PYTHON_NO_SIZE), ast.literal_eval, (1024, 768)),
        (("sh", "-c", CURL), json.loads, (1024, 768)),
    ],
    ids=["python, 1440x512", "python, no size", "curl"],
)
def test_published_example(
    live_with_key: LiveServer, command: tuple[str, ...], parse: Callable[[str], dict[str, Any]], size: tuple[int, int]
) -> None:
    before = len(statuses(live_with_key))
    check_published_reply(parse(run_example(live_with_key, *command)), live_with_key, *size)
    assert statuses(live_with_key)[before:] == [201]


def test_requests_sync_mode(live: LiveServer) -> None:
    body = {"model": "flux/srpo", "prompt": PROMPT, "sync_mode": True, "output_format": "png"} | SMALL
    reply = requests.post(f"{live.url}/v1/images/generations", json=body, timeout=120)
    assert reply.status_code == 201
    head, _, data = reply.json()["images"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert open_image(base64.b64decode(data)).size == (512, 512)


# --- the openai SDK -------------------------------------------------------------------------------------------------


def statuses(server: LiveServer, path: str = "/v1/images/generations") -> list[int]:
    """The status of every answered request for `path`, as the server's log has them."""
    lines = [json.loads(line) for line in server.settled_log().splitlines() if line.startswith("{")]
    return [line["status"] for line in lines if line.get("event") == "request" and line["path"] == path]


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", timeout=120, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_openai_generates_and_lists_models(live: LiveServer, prefix: str) -> None:
    with openai.OpenAI(base_url=live.url + prefix, api_key="unused", max_retries=0) as client:
        reply = client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL)
        assert reply.data
        assert reply.data[0].b64_json is None
        assert open_image(httpx.get(str(reply.data[0].url)).content).size == (512, 512)
        assert abs(reply.created - time.time()) < 3600
        assert "flux/srpo" in [model.id for model in client.models.list()]
        assert client.models.retrieve("flux/srpo").id == "flux/srpo"


@pytest.mark.parametrize(
    ("options", "size", "format"),
    [
        ({"size": "576x512"}, (576, 512), "JPEG"),
        ({"size": "256x256"}, (1024, 768), "JPEG"),
        ({"size": "auto", "extra_body": {"image_size": "square"}}, (512, 512), "JPEG"),
        ({"size": "square", "output_format": "png", "quality": "hd", "style": "vivid"}, (512, 512), "PNG"),
        ({"size": "square", "output_format": "webp", "background": "opaque", "user": "me"}, (512, 512), "WEBP"),
        ({"extra_body": {"image_size": {"width": 512, "height": 544}, "seed": 7}}, (512, 544), "JPEG"),
    ],
    ids=str,
)
def test_openai_options(client: openai.OpenAI, options: dict[str, Any], size: tuple[int, int], format: str) -> None:
    extra = {"num_inference_steps": 1} | options.get("extra_body", {})
    options = {"response_format": "b64_json"} | options | {"extra_body": extra}
    reply = client.images.generate(model="flux/srpo", prompt=PROMPT, **options)
    assert reply.data
    assert reply.data[0].url is None
    image = open_image(base64.b64decode(str(reply.data[0].b64_json)))
    assert (image.size, image.format) == (size, format)


def test_openai_n_images_of_a_seed_and_the_native_fields(client: openai.OpenAI) -> None:
    def generate(n: int, seed: int) -> openai.types.ImagesResponse:
        extra = SMALL | {"seed": seed, "guidance_scale": 3, "acceleration": "none"}
        return client.images.generate(
            model="flux/srpo", prompt=PROMPT, n=n, response_format="b64_json", extra_body=extra
        )

    pair, second = generate(2, 41), generate(1, 42)
    assert pair.data
    assert second.data
    assert len(pair.data) == 2
    assert pair.data[0].b64_json != pair.data[1].b64_json == second.data[0].b64_json
    assert pair.model_extra
    assert pair.model_extra["seed"] == 41
    assert pair.model_extra["meta"]["usage"]["tokens_used"] == 2 * 52500


async def test_openai_async(live: LiveServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0) as client:
        replies = await asyncio.gather(
            *(client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL) for _ in range(3))
        )
    assert len({reply.data[0].url for reply in replies if reply.data}) == 3


def test_openai_raw_response_has_the_headers(client: openai.OpenAI) -> None:
    raw = client.images.with_raw_response.generate(
        model="flux/srpo",
        prompt=PROMPT,
        extra_body=SMALL | {"guidence_scale": 3},
        extra_headers={"X-Client-Request-Id": "mine-1"},
    )
    assert raw.status_code == 201
    assert raw.headers["x-ignored-fields"] == "guidence_scale"
    assert raw.headers["x-client-request-id"] == "mine-1"
    assert raw.headers["x-aimlapi-credits-used"] == "52500"
    assert raw.parse()._request_id == raw.headers["x-request-id"]


# --- errors ---------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[], Exception]] = {
    "full": lambda: errors.QueueFull(3, 1.2),
    "failed": errors.GenerationFailed,
    "memory": errors.OutOfMemory,
    "bug": lambda: RuntimeError("a secret"),
    "loading": lambda: errors.NotReady("reading", 0.4, 1.2),
    "late": lambda: errors.DeadlineExceeded(9),
}


class FailingPool(WorkerPool):
    """A pool that fails each request in the way its prompt names."""

    async def start(self) -> None:
        self._started = time.monotonic()
        self._info = EngineInfo("tiny", "cpu", "float32", "f" * 32)

    async def stop(self) -> None:
        pass

    def submit(self, request: ImageRequest, previews: object = None, channel: object = None) -> Job:
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
    app = create_app(settings, FailingPool(build_engine_config(settings)))

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


@each_failure
def test_openai_shows_the_message_and_retries_what_may_pass(failing: Failing, failure: Failure) -> None:
    with (
        openai.OpenAI(base_url=f"{failing.url}/v1", api_key=failure.key, max_retries=1) as client,
        pytest.raises(failure.type) as caught,
    ):
        client.images.generate(model="", prompt="", extra_body=body_of(failure))
    error = caught.value
    assert error.status_code == failure.status
    assert failure.message in error.message
    assert "secret" not in error.message
    assert error.request_id == error.response.json()["requestId"]
    assert isinstance(error.body, dict)
    assert (error.code, error.type, error.param) == tuple(error.body[name] for name in ("code", "type", "param"))
    assert len(failing.arrivals) == failure.tries
    if "retry-after" in error.response.headers:  # the SDK's own pause would be half a second at most
        assert failing.arrivals[1] - failing.arrivals[0] >= 1.2


def test_openai_names_the_wrong_field(failing: Failing) -> None:
    with (
        openai.OpenAI(base_url=failing.url, api_key=KEY) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.images.generate(model="flux/srpo", prompt=PROMPT, n=9, extra_body={"num_inference_steps": "28"})
    assert caught.value.param == "num_inference_steps"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["data"][0]["path"] == ["num_inference_steps"]


@pytest.mark.parametrize(
    ("path", "type", "status"), [("/nothing", openai.NotFoundError, 404), ("/models", openai.APIStatusError, 405)]
)
def test_openai_at_a_wrong_path_or_with_a_wrong_method(
    live: LiveServer, client: openai.OpenAI, path: str, type: type[openai.APIStatusError], status: int
) -> None:
    with pytest.raises(type) as caught:
        client.post(path, body={}, cast_to=object)
    assert caught.value.status_code == status
    assert "(no body)" not in caught.value.message
    assert caught.value.response.json()["message"] in caught.value.message


def test_openai_from_a_foreign_page_is_forbidden(client: openai.OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="takes requests only from its own pages"):
        client.images.generate(
            model="flux/srpo", prompt=PROMPT, extra_body=SMALL, extra_headers={"Origin": "https://elsewhere.example"}
        )


def test_openai_with_a_wrong_key_and_a_right_one(live_with_key: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{live_with_key.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="This request requires a valid API key"):
            client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL)
        reply = client.with_options(api_key=KEY).images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL)
    assert reply.data
    assert requests.get(str(reply.data[0].url), headers={"authorization": "Bearer wrong"}, timeout=60).ok


def first_answer(client: openai.OpenAI) -> openai.InternalServerError:
    """What a server says as soon as its port is open: it must not be a success."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        try:
            client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL)
        except openai.APIConnectionError:
            time.sleep(0.02)
        except openai.InternalServerError as error:
            return error
        else:
            break
    pytest.fail("the server never said that it was loading")


def test_openai_at_a_loading_server(serve: Callable[..., LiveServer]) -> None:
    server = serve(wait=False, log_format="json")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        error = first_answer(client)
        assert error.status_code == 503
        assert "not ready yet" in error.message
        assert 1 <= int(error.response.headers["retry-after"]) <= 120
        assert error.response.json().keys() >= {"stage", "progress", "eta_seconds"}
        server.wait_ready()  # that the SDK waits as long as it is told is tested above
        assert client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL).data
    seen = statuses(server)
    assert seen == [503] * (len(seen) - 1) + [201]


def test_openai_at_a_busy_server(serve: Callable[..., LiveServer]) -> None:
    """One runs and one waits until their time is over; a third is told when to come back."""
    server = serve(queue_size="1", max_running="1", request_timeout="4", log_format="json")

    def generate(retries: int) -> openai.APIStatusError:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=retries) as client:
            slow = {"image_size": {"width": 1536, "height": 1536}, "num_inference_steps": 50, "num_images": 4}
            with pytest.raises(openai.APIStatusError) as caught:
                client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=slow)
            return caught.value

    with ThreadPoolExecutor(3) as threads:
        replies = {error.status_code: error for error in threads.map(generate, [0] * 3)}
    assert replies.keys() == {429, 504}
    assert isinstance(replies[429], openai.RateLimitError)
    assert "The queue is full" in replies[429].message
    seconds = int(replies[429].response.headers["retry-after"])
    assert 1 <= seconds <= 120
    assert (seconds - 1) * 1000 < int(replies[429].response.headers["retry-after-ms"]) <= seconds * 1000
    assert "within 4 s" in replies[504].message
    before = len(statuses(server))
    assert generate(2).status_code == 504
    assert statuses(server)[before:] == [504]  # it would only happen again


# --- LiteLLM --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def litellm_module() -> Iterator[tuple[ModuleType, list[str]]]:
    """LiteLLM, and the places outside this machine that it has called."""
    places: list[str] = []
    on = True

    def watch(event: str, details: tuple[Any, ...]) -> None:
        if not on or event not in ("socket.connect", "socket.getaddrinfo"):
            return
        address = details[1] if event == "socket.connect" else details
        host = address[0] if isinstance(address, tuple) else "localhost"  # a path is a Unix socket's
        if host not in ("127.0.0.1", "localhost", "::1", None):
            places.append(str(host))

    sys.addaudithook(watch)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        warnings.simplefilter("ignore")  # its own modules use what its dependencies have deprecated
        import litellm

        litellm.telemetry = False
        yield litellm, places
    on = False


@pytest.fixture
def litellm(litellm_module: tuple[ModuleType, list[str]]) -> Iterator[ModuleType]:
    module, places = litellm_module
    yield module
    assert places == []


each_prefix = pytest.mark.parametrize("prefix", ["aiml/", "openai/"])


@pytest.mark.parametrize("wants", ["url", "b64_json"])
@pytest.mark.parametrize(
    ("prefix", "spelling"),
    [
        ("aiml/", lambda wants: {"response_format": wants, "num_inference_steps": 1}),  # goes out as output_format
        ("aiml/", lambda wants: {"extra_body": {"response_format": wants, "num_inference_steps": 1}}),  # goes out so
        ("openai/", lambda wants: {"extra_body": {"response_format": wants, "num_inference_steps": 1}}),
    ],
    ids=["aiml", "aiml, extra_body", "openai"],
)
def test_litellm_generates(
    live: LiveServer, litellm: ModuleType, prefix: str, spelling: Callable[[str], dict[str, Any]], wants: str
) -> None:
    options = {"n": 2, "size": "544x512", "api_base": f"{live.url}/v1", "api_key": "unused"} | spelling(wants)
    reply = litellm.image_generation(model=f"{prefix}flux/srpo", prompt=PROMPT, **options)
    assert len(reply.data) == 2
    for item in reply.data:
        content = base64.b64decode(item.b64_json) if wants == "b64_json" else httpx.get(item.url).content
        assert open_image(content).size == (544, 512)


@each_prefix
@each_failure
def test_litellm_shows_the_message(failing: Failing, litellm: ModuleType, prefix: str, failure: Failure) -> None:
    body = body_of(failure)
    model, prompt = body.pop("model"), body.pop("prompt")
    with pytest.raises(openai.APIError) as caught:  # every one of its classes is one of these
        litellm.image_generation(model=prefix + model, prompt=prompt, api_base=failing.url, api_key=failure.key, **body)
    assert caught.value.status_code == failure.status
    assert failure.message in str(caught.value)
    retried = prefix == "openai/" and failure.tries > 1  # by the SDK below it, which retries twice
    assert len(failing.arrivals) == (3 if retried else 1)
