"""Bodies of requests on a real port: how many bytes of them there may be, and when they are refused."""

import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from faults.good import PATH
from faults.outcome import MIB
from faults.strangers import STALLED_FORM, STALLED_JSON, body_head
from support.img2img import FILE, uri
from support.scripted_process import ScriptedProcess, scripted_process
from support.scripted_server import Gate
from support.server import START_LIMIT, LiveServer, running
from support.strangers import SlowSockets
from support.waiting import LIMIT, within

from server.process.memory import THRESHOLD

BUDGET = 32 * MIB


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with room for two large bodies, and for one request."""
    with running(
        tmp_path_factory.mktemp("small"),
        uploads=str(BUDGET),
        body_timeout="3600",
        max_running="1",
        queue_size="0",
        safety_checker="none",
    ) as server:
        yield server


def refusals(sockets: SlowSockets) -> list[str]:
    """The codes of the errors that were heard."""
    found = [re.search(rb'"code": "(\w+)"', heard) for heard in sockets.hearing()]  # some have come in part
    return [match[1].decode() for match in found if match]


def memory(server: LiveServer | ScriptedProcess) -> int:
    """Bytes of resident memory."""
    return int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def in_flight(server: ScriptedProcess) -> int:
    """Requests that are drawn or wait for it."""
    health = httpx.get(f"{server.url}/health").json()
    return int(health["running"] + health["waiting"])


def temporary_bytes(server: LiveServer) -> int:
    """Bytes in nameless files that the process has open."""
    total = 0
    for path in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            if re.match(r"/tmp/.*\(deleted\)$", str(path.readlink())):
                total += path.stat().st_size
    return total


@pytest.mark.parametrize("body", [STALLED_JSON, STALLED_FORM], ids=["json", "form"])
def test_stalled_uploads_take_no_more_than_the_budget_and_give_it_back(small: LiveServer, body: bytes) -> None:
    assert small.generate().status_code == 201
    before = memory(small)
    with SlowSockets(small.port, 12, body, patient=True) as stalled:
        assert within(LIMIT, lambda: len(refusals(stalled)) == 10)
        assert set(refusals(stalled)) == {"uploads_full"}
        assert memory(small) + temporary_bytes(small) < before + BUDGET + 8 * MIB
        assert small.generate().status_code == 201
    assert within(LIMIT, lambda: memory(small) + temporary_bytes(small) < before + 8 * MIB)
    assert "Traceback" not in small.settled_log()
    lines = [line for line in small.log.read_text().splitlines() if '"status": 499' in line]
    assert len(lines) >= 2
    assert all("ClientDisconnect" in line for line in lines)


def test_a_large_body_is_refused_before_it_is_sent_where_there_is_no_room_for_its_request(small: LiveServer) -> None:
    slow = {"num_inference_steps": 50, "num_images": 4, "image_size": "square_hd", "acceleration": "none"}
    with ThreadPoolExecutor(1) as threads, small.client() as client:
        body = {"model": "flux/srpo", "prompt": "x", **slow}
        running = threads.submit(client.post, PATH, json=body, headers={"prefer": "respond-async"})
        job = running.result().json()
        try:
            with socket.create_connection(("127.0.0.1", small.port), LIMIT) as connection:
                connection.sendall(body_head(PATH, 15 * MIB, "application/json") + b"{")
                heard = connection.recv(2**16)
            assert heard.startswith(b"HTTP/1.1 429 ")
            whole = client.post(PATH, content=b" " * (15 * MIB), headers={"content-type": "application/json"})
            assert whole.json()["error"]["code"] == "queue_full"
            small_one = client.post(PATH, json={"model": "flux/srpo"})
            assert (small_one.status_code, small_one.json()["error"]["param"]) == (400, "prompt")
        finally:
            client.delete(f"/v1/jobs/{job['id']}")


@pytest.mark.parametrize("body", [b'{"a":[' + b"1," * 7_000_000 + b"1]}", b"[" * 15_000_000], ids=["flat", "deep"])
def test_millions_of_values_are_refused_before_they_are_parsed(small: LiveServer, body: bytes) -> None:
    """The parser would keep the server from doing anything else, for seconds."""
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{small.url}{PATH}", content=body, headers=headers, timeout=START_LIMIT)
    assert reply.status_code == 400
    assert "100,000 values" in reply.json()["message"]


def test_a_large_text_is_no_fault(small: LiveServer) -> None:
    assert small.generate(unknown="a" * (15 * MIB)).status_code == 201


def test_a_job_whose_client_waits_keeps_no_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five clients wait for jobs that began at pictures of 9 MiB in JSON."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(THRESHOLD))  # as `srpo serve` has it
    gate, picture = Gate(tmp_path / "gate"), uri(FILE + bytes(8 * MIB * 3 // 4))
    fields = {"model": "flux/srpo/image-to-image", "image_url": picture, "num_inference_steps": 1}

    def draw(server: ScriptedProcess, prompt: str, seed: int) -> int:
        headers = {"idempotency-key": f"{prompt} {seed}"}
        body = fields | {"prompt": prompt, "seed": seed}
        return httpx.post(f"{server.url}{PATH}", json=body, headers=headers, timeout=START_LIMIT).status_code

    with scripted_process(tmp_path / "data") as server, ThreadPoolExecutor(5) as threads:
        assert draw(server, "quick", 1) == 201
        before = memory(server)
        drawing = [threads.submit(draw, server, gate.prompt, seed) for seed in range(1, 6)]
        try:
            assert within(LIMIT, lambda: in_flight(server) == 5)
            assert within(LIMIT, lambda: memory(server) < before + 20 * MIB)
        finally:
            gate.allow(100)
        assert [reply.result() for reply in drawing] == [201] * 5
