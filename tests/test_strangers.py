"""Nothing waits for a stranger: a slow moderation service, client or host takes its own threads, time and bytes."""

import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.pictures import Peer
from support.scripted_server import Scripted
from support.server import START_LIMIT, LiveServer
from support.strangers import DrippingService
from support.waiting import LIMIT, within

from pipelines.errors import SafetyUnavailable
from pipelines.safety.moderation import ImageHook, PromptHook
from server.process.threads import POOLS

BODY = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 1}
VERDICT = b'{"flagged": false}'
FINE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(VERDICT), VERDICT)
DRIPPING = (b"HTTP/1.1 200 OK\r\nx-slow: ", b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\n")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker finds the scripted engine."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def post(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=BODY, timeout=START_LIMIT)


def test_a_file_does_not_wait_for_a_prompt_hook(tmp_path: Path) -> None:
    answer = threading.Event()
    answer.set()
    hook = Peer("127.0.0.1", FINE, after=answer)
    with Scripted(tmp_path, safety_checker="none", prompt_hook=hook.url, safety_timeout=START_LIMIT) as server:
        file = post(server.url).json()["images"][0]["url"]
        answer.clear()
        with ThreadPoolExecutor(12) as threads:
            held = [threads.submit(post, server.url) for _ in range(12)]
            assert within(LIMIT, lambda: hook.connections == 1 + POOLS["prompts"])
            assert httpx.get(file, timeout=START_LIMIT).status_code == 200
            assert not any(request.done() for request in held)
            answer.set()
            assert [request.result().status_code for request in held] == [201] * 12


@pytest.mark.parametrize("start", DRIPPING, ids=["headers", "body"])
def test_a_hook_that_drips_its_answer_has_a_deadline(start: bytes) -> None:
    hook = DrippingService(start)
    with pytest.raises(SafetyUnavailable):
        PromptHook(hook.url, 0.3)("x")


def test_a_hook_whose_answer_is_nested_deeply_gives_no_verdict() -> None:
    body = b"[" * 60_000
    hook = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    with pytest.raises(SafetyUnavailable):
        ImageHook(hook.url, LIMIT).self_test()


@pytest.mark.long
def test_the_server_ends_within_its_grace_whatever_a_hook_does(serve: Callable[..., LiveServer]) -> None:
    hook = DrippingService(DRIPPING[0])
    server = serve(prompt_hook=hook.url, safety_timeout="3600", shutdown_grace="1", log_format="json")
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(server.generate)
        assert within(LIMIT, lambda: hook.connections == 1)
        server.process.send_signal(signal.SIGTERM)
        assert held.result().json()["error"]["code"] == "draining"
    assert server.process.wait(LIMIT) == 0
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert [entry["threads"] for entry in entries if entry["event"] == "threads_left"] == [{"prompts": 1}]


@pytest.mark.long
def test_a_second_signal_ends_the_server_at_once(serve: Callable[..., LiveServer]) -> None:
    hook = DrippingService(DRIPPING[0])
    server = serve(prompt_hook=hook.url, safety_timeout="3600", shutdown_grace="3600")
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(server.generate)
        assert within(LIMIT, lambda: hook.connections == 1)
        server.process.send_signal(signal.SIGTERM)
        assert within(LIMIT, lambda: not accepts(server))
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT) == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            held.result()


def accepts(server: LiveServer) -> bool:
    try:
        httpx.get(f"{server.url}/health")
        return True
    except httpx.TransportError:
        return False
