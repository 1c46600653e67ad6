"""Wrong keys are refused late, and a retry of an SDK joins its first try."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from support.pictures import file_of
from support.scripted_server import Gate, Scripted
from support.server import START_LIMIT
from support.strangers import Leaver
from support.tcp_proxy import proxy_to

from server.jobs import joining
from server.security.limits import FREE, MAX_ADDRESSES, MIN_WAIT, RECOVERY, FailedKeys

PATH = "/v1/images/generations"
BODY: dict[str, Any] = {"model": "flux/srpo", "image_size": "square", "num_inference_steps": 2}
KEY = "secret-key-1"


# --- wrong keys ------------------------------------------------------------------------------------------------------


def test_refusals_take_longer_with_each_and_recover() -> None:
    failed = FailedKeys(5.0)
    waits = [failed.count("192.0.2.1", 0.0) for _ in range(int(FREE) + 20)]
    assert waits[: int(FREE)] == [0.0] * int(FREE)
    assert waits[int(FREE)] == MIN_WAIT
    assert waits == sorted(waits)
    assert waits[-1] == 5.0
    assert failed.count("192.0.2.2", 0.0) == 0
    assert failed.count("192.0.2.1", 100 * RECOVERY) == 0


def test_an_ipv6_network_counts_as_one_address() -> None:
    failed = FailedKeys(5.0)
    waits = [failed.count(f"2001:db8::{number:x}", 0.0) for number in range(int(FREE) + 1)]
    assert waits[-1] == MIN_WAIT
    assert failed.count("2001:db8:1::1", 0.0) == 0


def test_the_table_of_addresses_is_bounded() -> None:
    failed = FailedKeys(5.0)
    for number in range(MAX_ADDRESSES + 100):
        failed.count(f"address {number}", 0.0)
    assert len(failed._failures) == MAX_ADDRESSES


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        folder = tmp_path_factory.mktemp("retries")
        with Scripted(folder, safety_checker="none", api_keys=(KEY, "secret-key-2")) as scripted:
            yield scripted


def test_a_wrong_key_waits_and_a_right_one_does_not(server: Scripted) -> None:
    def ask(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{server.url}/v1/jobs", headers=headers, timeout=START_LIMIT).status_code

    with ThreadPoolExecutor(40) as threads:
        assert set(threads.map(ask, ["wrong"] * 40)) == {401}
        late = threads.submit(ask, "wrong")
        assert [ask("secret-key-1") for _ in range(5)] == [200] * 5
        assert not late.done()
        assert late.result() == 401


# --- retries ---------------------------------------------------------------------------------------------------------


def tried(server: Scripted, tries: int, prompt: str, key: str = KEY, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", "x-stainless-retry-count": str(tries)}
    body = BODY | {"prompt": prompt} | fields
    return httpx.post(server.url + PATH, json=body, headers=headers, timeout=START_LIMIT)


def test_a_retry_that_joins_holds_no_picture_while_it_waits(server: Scripted, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    picture = base64.b64encode(file_of(Image.effect_noise((512, 512), 60))).decode()
    fields: dict[str, Any] = {
        "model": "flux/srpo/image-to-image", "image_url": f"data:image/png;base64,{picture}", "image_size": None,
    }  # fmt: skip
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(tried, server, 0, gate.prompt, **fields)
        Scripted.until(lambda: gate.begun == 1)
        again = threads.submit(tried, server, 1, gate.prompt, **fields)
        Scripted.until(lambda: server.waiting_clients == 2)
        held = server.app.parts.uploads.taken
        gate.allow(1000)
    assert held == 0
    assert first.result().status_code == again.result().status_code == 201
    assert again.result().headers["idempotent-replayed"] == "true"


def test_a_form_that_joins_keeps_no_file_of_its_picture(server: Scripted, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    picture = file_of(Image.effect_noise((1536, 1536), 60))  # too large to be kept in memory

    def edit(tries: int) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}", "x-stainless-retry-count": str(tries)}
        form = {"model": "flux/srpo", "prompt": gate.prompt}
        files = {"image": ("a.png", picture, "image/png")}
        url = f"{server.url}/v1/images/edits"
        return httpx.post(url, data=form, files=files, headers=headers, timeout=START_LIMIT)

    before = count_nameless_files()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(edit, 0)
        Scripted.until(lambda: gate.begun == 1)
        again = threads.submit(edit, 1)
        Scripted.until(lambda: server.waiting_clients == 2)
        during = count_nameless_files()
        gate.allow(1000)
    assert during == before
    assert first.result().status_code == again.result().status_code == 201
    assert again.result().headers["idempotent-replayed"] == "true"


def count_nameless_files() -> int:
    """Files that this process, which the server is a thread of, holds open though they are in no folder."""
    names = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(str(descriptor.readlink()))
    return sum(name.endswith(" (deleted)") and not name.startswith("/memfd:") for name in names)


def test_a_retry_joins_its_first_try(server: Scripted, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(tried, server, 0, gate.prompt)
        Scripted.until(lambda: gate.begun == 1)
        again = [threads.submit(tried, server, tries, gate.prompt) for tries in (1, 2)]
        Scripted.until(lambda: server.waiting_clients == 3)
        others = ThreadPoolExecutor(3)
        different = [
            others.submit(tried, server, 0, gate.prompt),
            others.submit(tried, server, 1, gate.prompt, seed=7),
            others.submit(tried, server, 1, gate.prompt, "secret-key-2"),
        ]
        Scripted.until(lambda: server.in_flight == 4)
        gate.allow(1000)
        replies = [first.result(), *(retry.result() for retry in again)]
        apart = [reply.result() for reply in different]
        others.shutdown()
    assert [reply.status_code for reply in (*replies, *apart)] == [201] * 6
    assert len({reply.json()["seed"] for reply in replies}) == 1
    assert [reply.headers.get("idempotent-replayed") for reply in replies] == [None, "true", "true"]
    assert gate.begun == 4 * BODY["num_inference_steps"]
    assert not {reply.headers.get("idempotent-replayed") for reply in apart} - {None}


def test_the_retry_of_a_refused_try_joins_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two users of one key ask for the same; one is refused, and comes back while the other's still runs."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    gate = Gate(tmp_path / "gate")
    with (
        Scripted(tmp_path, safety_checker="none", api_keys=(KEY,), queue_size=1) as server,
        ThreadPoolExecutor(3) as threads,
    ):
        first = [threads.submit(tried, server, 0, gate.prompt) for _ in range(2)]
        Scripted.until(lambda: server.in_flight == 2 and gate.begun == 1)
        assert tried(server, 0, gate.prompt).status_code == 429
        again = threads.submit(tried, server, 1, gate.prompt)
        Scripted.until(lambda: again.done())
        assert again.result().status_code == 429
        gate.allow(1000)
        replies = [reply.result() for reply in first]
        replies.append(tried(server, 2, gate.prompt))
    assert [reply.status_code for reply in replies] == [201] * 3
    assert not {reply.headers.get("idempotent-replayed") for reply in replies} - {None}
    assert len({reply.json()["seed"] for reply in replies}) == 3


def test_an_sdk_that_loses_its_connection_gets_the_reply_of_its_first_try(
    server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "PAUSE", START_LIMIT)
    gate = Gate(tmp_path / "gate")
    asked: dict[str, Any] = {
        "model": "flux/srpo", "prompt": gate.prompt, "extra_body": {"num_inference_steps": 2},
    }  # fmt: skip
    with (
        proxy_to(server.port) as network,
        ThreadPoolExecutor(1) as threads,
        openai.OpenAI(base_url=f"http://127.0.0.1:{network.port}/v1", api_key=KEY, max_retries=0) as client,
    ):
        first = threads.submit(lambda: client.images.generate(**asked))
        Scripted.until(lambda: gate.begun == 1)
        network.cut()
        assert isinstance(first.exception(), openai.APIConnectionError)
        network.mode = "pass"
        gate.allow(1000)
        retried = {"x-stainless-retry-count": "1"}
        reply = client.images.with_raw_response.generate(**asked, extra_headers=retried)
    assert reply.headers["idempotent-replayed"] == "true"
    assert gate.begun == 2


def test_what_no_retry_comes_for_is_dropped(server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "PAUSE", 0.2)
    gate = Gate(tmp_path / "gate")
    headers = {"authorization": f"Bearer {KEY}", "x-stainless-retry-count": "0"}
    leaver = Leaver(server.url + PATH, BODY | {"prompt": gate.prompt}, headers)
    Scripted.until(lambda: gate.begun == 1)
    leaver.leave()
    Scripted.until(lambda: server.in_flight == 0)
    gate.allow(1000)
    assert tried(server, 1, "x").status_code == 201
