"""Real Python clients and curl against a real loopback port: they work unmodified, and show what went wrong.

The published examples run word for word; only the host and the key are replaced.
"""

import ast
import asyncio
import base64
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import openai
import pytest
import requests
from support.clients import (
    KEY,
    SMALL,
    Failing,
    Failure,
    body_of,
    check_published_reply,
    each_failure,
    run_example,
    statuses,
)
from support.pictures import open_image
from support.scripted_server import Gate, Scripted
from support.server import PROMPT, LiveServer

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
    body: dict[str, Any] = {"model": "flux/srpo", "prompt": PROMPT, "sync_mode": True, "output_format": "png"} | SMALL
    reply = requests.post(f"{live.url}/v1/images/generations", json=body, timeout=120)
    assert reply.status_code == 201
    head, _, data = reply.json()["images"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert open_image(base64.b64decode(data)).size == (512, 512)


# --- the openai SDK -------------------------------------------------------------------------------------------------


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
        ({"size": "256x256"}, (512, 512), "JPEG"),
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


def test_openai_at_a_loading_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with (
        Scripted(tmp_path, loading=True, safety_checker="none") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL)
        error = caught.value
        assert error.status_code == 503
        assert "not ready yet" in error.message
        assert 1 <= int(error.response.headers["retry-after"]) <= 120
        assert error.response.json().keys() >= {"stage", "progress", "eta_seconds"}
        (tmp_path / "loaded").touch()
        server.until(lambda: server.pool.status().state == "ready")  # that the SDK waits as it is told is tested above
        assert client.images.generate(model="flux/srpo", prompt=PROMPT, extra_body=SMALL).data
    assert server.statuses == [503, 201]


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    """One request runs, one waits."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Scripted(tmp_path / "data", queue_size=1, safety_checker="none") as server:
        yield server


def test_openai_at_a_busy_server(busy: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs and one waits until their time is over; a third is told when to come back."""
    gate = Gate(tmp_path / "gate")

    def generate(retries: int) -> openai.APIStatusError:
        with openai.OpenAI(base_url=f"{busy.url}/v1", api_key="unused", max_retries=retries) as client:
            with pytest.raises(openai.APIStatusError) as caught:
                client.images.generate(model="flux/srpo", prompt=gate.prompt, extra_body=SMALL)
            return caught.value

    with ThreadPoolExecutor(2) as threads:
        taken = [threads.submit(generate, 0) for _ in range(2)]
        busy.until(lambda: busy.in_flight == 2)
        refused = generate(0)
        monkeypatch.setattr(busy.pool, "_request_timeout", 1)
        for job in busy.pool._dispatcher.unfinished():
            job.deadline = time.monotonic()
        late = [error.result() for error in taken]
    assert isinstance(refused, openai.RateLimitError)
    assert "The queue is full" in refused.message
    seconds = int(refused.response.headers["retry-after"])
    assert 1 <= seconds <= 120
    assert (seconds - 1) * 1000 < int(refused.response.headers["retry-after-ms"]) <= seconds * 1000
    assert [error.status_code for error in late] == [504, 504]
    assert "within 1 s" in late[0].message
    before = len(busy.statuses)
    assert generate(2).status_code == 504
    assert busy.statuses[before:] == [504]  # it would only happen again
    gate.allow(100)


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
    error: Any = caught.value  # LiteLLM's own, with a status
    assert error.status_code == failure.status
    assert failure.message in str(error)
    retried = prefix == "openai/" and failure.tries > 1  # by the SDK below it, which retries twice
    assert len(failing.arrivals) == (3 if retried else 1)
