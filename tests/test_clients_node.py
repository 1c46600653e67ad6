"""Real JavaScript clients on Node against a real loopback port: they work unmodified, and show what went wrong.

The clients are installed once from the lock file beside their script; without Node 20 and npm the tests are skipped.
"""

import base64
import json
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from support.clients import (
    FAILURES,
    SMALL,
    Failing,
    Failure,
    body_of,
    check_published_reply,
    each_failure,
    run_example,
    statuses,
)
from support.node import FOLDER, ask
from support.pictures import open_image
from support.server import PROMPT, LiveServer

JS_1440x512 = """async function main() {
  const response = await fetch('https://api.aimlapi.com/v1/images/generations', {
    method: 'POST',
    headers: {
      // Insert your AIML API Key instead of <YOUR_AIMLAPI_KEY>:
      'Authorization': 'Bearer <YOUR_AIMLAPI_KEY>',
      'Content-Type': 'application/json',
    },
    body: JSON.stringify({
      model: 'flux/srpo',
      prompt: 'A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses.',
      image_size: {
                width: 1440,
                height: 512
            }
    }),
  });

  const data = await response.json();
  console.log(data);
}

main();
"""

JS_NO_SIZE = """async function main() {
  const response = await fetch('https://api.aimlapi.com/v1/images/generations', {
    method: 'POST',
    headers: {
      'Authorization': 'Bearer <YOUR_AIMLAPI_KEY>',
      'Content-Type': 'application/json',
    },
    body: JSON.stringify({
      model: 'flux/srpo',
      prompt: 'A T-Rex relaxing on a beach, lying on a sun lounger and wearing sunglasses.',
    }),
  });

  const data = await response.json();
  console.log(JSON.stringify(data, null, 2));
}

main();"""


def test_the_lock_file_names_no_host() -> None:
    packages = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    installed = {path: package for path, package in packages.items() if path}
    assert installed
    assert all("resolved" not in package and package["integrity"] for package in installed.values())


def as_object(node: str, printed: str) -> dict[str, Any]:
    """What `console.log` printed of an object, as JSON."""
    code = "process.stdout.write(JSON.stringify(eval('(' + require('fs').readFileSync(0, 'utf8') + ')')))"
    ended = subprocess.run([node, "-e", code], input=printed, capture_output=True, text=True, check=True)
    value: dict[str, Any] = json.loads(ended.stdout)
    return value


@pytest.mark.parametrize(
    ("code", "parse", "size"),
    [(JS_1440x512, as_object, (1440, 512)), (JS_NO_SIZE, lambda _, printed: json.loads(printed), (1024, 768))],
    ids=["1440x512", "no size"],
)
def test_published_example(
    live_with_key: LiveServer,
    node: str,
    code: str,
    parse: Callable[[str, str], dict[str, Any]],
    size: tuple[int, int],
) -> None:
    before = len(statuses(live_with_key))
    check_published_reply(parse(node, run_example(live_with_key, node, "-e", code)), live_with_key, *size)
    assert statuses(live_with_key)[before:] == [201]


@pytest.mark.parametrize("wants", ["url", "b64_json"])
@pytest.mark.parametrize("prefix", ["/v1", ""])
def test_openai_generates(live: LiveServer, clients: str, prefix: str, wants: str) -> None:
    fields: dict[str, Any] = {"model": "flux/srpo", "prompt": PROMPT, "n": 2, "response_format": wants} | SMALL
    images = ask(clients, "openai", live.url + prefix, **fields)["images"]
    assert [list(image) for image in images] == [["url" if wants == "url" else "b64"]] * 2
    for image in images:
        content = httpx.get(image["url"]).content if wants == "url" else base64.b64decode(image["b64"])
        assert open_image(content).size == (512, 512)


def test_openai_lists_the_models(live: LiveServer, clients: str) -> None:
    assert "flux/srpo" in ask(clients, "models", f"{live.url}/v1")["images"]


@pytest.mark.parametrize(
    ("client", "n", "more"),
    [("ai, openai", 1, {}), ("ai, compatible", 2, {"num_inference_steps": 1, "output_format": "png"})],
    ids=["openai", "compatible"],
)
def test_ai_sdk_generates(live: LiveServer, clients: str, client: str, n: int, more: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"model": "flux/srpo", "prompt": PROMPT, "n": n, "size": "512x512"} | more
    images = ask(clients, client, f"{live.url}/v1", **fields)["images"]
    assert len(images) == n
    for image in images:
        assert open_image(base64.b64decode(image["b64"])).size == (512, 512)


NAMES = {
    "BadRequestError": 400,
    "AuthenticationError": 401,
    "APIError": 413,
    "RateLimitError": 429,
    "InternalServerError": 500,
}


@each_failure
def test_openai_shows_the_message_and_retries_what_may_pass(clients: str, failing: Failing, failure: Failure) -> None:
    error = ask(clients, "openai", f"{failing.url}/v1", failure.key, retries=1, **body_of(failure))["error"]
    assert NAMES[error["name"]] == min(failure.status, 500)
    assert error["status"] == failure.status
    assert failure.message in error["message"]
    assert len(failing.arrivals) == failure.tries
    if failure.status in (429, 503):  # the SDK's own pause would be half a second at most
        assert failing.arrivals[1] - failing.arrivals[0] >= 1.2


@pytest.mark.parametrize("client", ["ai, openai", "ai, compatible"])
@pytest.mark.parametrize("name", ["unknown model", "wrong key", "queue full", "failed"])
def test_ai_sdk_shows_the_message(clients: str, failing: Failing, client: str, name: str) -> None:
    failure = FAILURES[name]
    error = ask(clients, client, f"{failing.url}/v1", failure.key, retries=1, **body_of(failure))["error"]
    assert error["status"] == failure.status
    assert failure.message in error["message"]
    assert len(failing.arrivals) == (2 if failure.status >= 429 else 1)  # it does not know x-should-retry


@pytest.mark.parametrize("client", ["openai", "ai, openai", "ai, compatible"])
def test_a_wrong_path(clients: str, failing: Failing, client: str) -> None:
    error = ask(clients, client, f"{failing.url}/v2", model="flux/srpo", prompt=PROMPT)["error"]
    assert error["status"] == 404
    assert "There is nothing at this path." in error["message"]
