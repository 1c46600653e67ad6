"""Good clients: what they ask for, what they must get, and the measuring of a fault by them."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from faults.outcome import (
    MIB,
    Fault,
    Outcome,
    Tally,
    peak_memory,
    reset_peak,
    show_p99,
    show_ratio,
    show_through,
)
from support.jobs import KEYS, PREFER
from support.server import START_LIMIT, LiveServer
from support.waiting import within

PATH = "/v1/images/generations"
CANARY = "a canary that sings in no log"
GOOD = {
    "model": "flux/srpo",
    "prompt": CANARY,
    "image_size": "square",
    "num_inference_steps": 1,
    "response_format": "b64_json",
    "output_format": "png",
}
KEY = {"authorization": f"Bearer {KEYS[0]}"}
REFUSED = (408, 413, 429, 503)
ENDED = ("succeeded", "failed", "cancelled")

looks: list[float] = []  # the seconds of each look at /health while there was any fault
_drawn_quietly: dict[tuple[int, int], Any] = {}  # what each seed and number of steps gives, on any server of this model


def draw(server: LiveServer, seed: int, steps: int = 1, **headers: str) -> httpx.Response | None:
    """The reply to a good request, with the picture in it; None where there is no reply at all."""
    try:
        with server.client(headers=KEY | headers) as client:
            return client.post(PATH, json=GOOD | {"seed": seed, "num_inference_steps": steps})
    except httpx.TransportError:
        return None


def pictures(body: Any) -> list[str]:
    return [item["b64_json"] for item in body["data"]]


def draw_quietly(server: LiveServer, seed: int, steps: int = 1) -> list[str]:
    """The pictures that a server without faults draws."""
    if (seed, steps) not in _drawn_quietly:
        reply = draw(server, seed, steps)
        assert reply is not None
        assert reply.is_success, reply.text
        _drawn_quietly[seed, steps] = pictures(reply.json())
    drawn: list[str] = _drawn_quietly[seed, steps]
    return drawn


def ask(server: LiveServer, path: str) -> Any:
    return httpx.get(server.url + path, headers=KEY, timeout=START_LIMIT).json()


def health(server: LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = ask(server, "/health")
    return found


def judge_reply(tally: Tally, reply: httpx.Response | None, wanted: list[str]) -> None:
    tally.offered += 1
    if reply is None:
        tally.accepted += 1
        tally.lost += 1
        return
    tally.accepted += reply.status_code not in REFUSED
    if reply.is_success:
        tally.finished += 1
        tally.wrong += pictures(reply.json()) != wanted
    elif reply.status_code not in REFUSED:
        tally.lost += 1


class Jobs:
    """Durable jobs that were acknowledged before a fault, each of another seed."""

    def __init__(self, server: LiveServer, tally: Tally, count: int, steps: int = 10) -> None:
        self._server, self._tally, self._steps = server, tally, steps
        self._stored = count_images(server)
        self._jobs: dict[int, str] = {}
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(self._post, range(1, count + 1)))

    def _post(self, seed: int) -> None:
        reply = draw(self._server, seed, self._steps, **PREFER)
        self._tally.offered += 1
        if reply is not None and reply.status_code == 202:
            self._tally.accepted += 1
            self._jobs[seed] = reply.json()["id"]

    def wait_running(self) -> None:
        """Until one of them is being drawn; where a fast server has drawn them all, of some more."""
        while not health(self._server)["running"]:
            self._post(max(self._jobs, default=0) + 1)

    def settle(self, others: int = 0) -> None:
        """Wait for the end of each, and count. The server is well again; it has kept so many other images meanwhile."""
        for seed, job in self._jobs.items():
            ended = within(START_LIMIT, lambda job=job: self._state(job) in ENDED)  # type: ignore[misc]
            found = ask(self._server, f"/v1/jobs/{job}") if ended else {}
            if found.get("status") == "succeeded":
                self._tally.finished += 1
                self._tally.wrong += pictures(found["reply"]) != draw_quietly(self._server, seed, self._steps)
            else:
                self._tally.lost += 1
        self._tally.duplicated += max(0, count_images(self._server) - self._stored - len(self._jobs) - others)

    def _state(self, job: str) -> str:
        try:
            state: str = ask(self._server, f"/v1/jobs/{job}").get("status", "")
            return state
        except httpx.TransportError:
            return ""


def count_images(server: LiveServer) -> int:
    return sum(path.is_file() for path in (server.data_dir / "images").rglob("*.*"))


@contextmanager
def pinging(server: LiveServer) -> Iterator[list[float]]:
    """The seconds of each look at /health meanwhile, one after the other; they are there at the end."""
    seconds: list[float] = []
    command = [sys.executable, "-S", str(Path(__file__).with_name("pings.py")), str(server.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield seconds
        finally:
            process.terminate()
            seconds += json.loads(process.stdout.read())
            looks.extend(seconds)


def measure(fault: Fault, server: LiveServer) -> Outcome:
    """Send good requests, one after the other, while the fault holds."""
    seeds = range(1, fault.draws + 1)
    wanted = [draw_quietly(server, seed) for seed in seeds]
    before = [timed(server, seed)[1] for seed in seeds[:2]]
    during: list[float] = []
    reset_peak(server)
    memory, first, restarts = peak_memory(server), server.process.pid, health(server)["restarts"]
    tally, works, recovered = Tally(), list[str](), None
    with pinging(server) as pings:
        with fault.hold(server, tally):
            for seed in seeds:
                reply, seconds = timed(server, seed)
                judge_reply(tally, reply, wanted[seed - 1])
                if reply is not None and reply.is_success:
                    during.append(seconds)
                    works.append(reply.headers["x-inference-id"])
                    recovered = recovered or time.monotonic()
            for _ in range(fault.reads):
                read(server, tally)
            peak = peak_memory(server)
        ended = time.monotonic()
        assert within(START_LIMIT, lambda: (reply := draw(server, 1)) is not None and reply.is_success)
        recovery = time.monotonic() - ended if tally.struck is None else (recovered or time.monotonic()) - tally.struck
    restarted = health(server)["restarts"] - (restarts if server.process.pid == first else 0)
    return Outcome(
        fault.case,
        fault.incidents,
        offered=tally.offered,
        accepted=tally.accepted,
        finished=tally.finished,
        lost=tally.lost,
        duplicated=tally.duplicated + len(works) - len(set(works)),
        wrong=tally.wrong,
        let_through=show_through(tally) + "".join(f"; {what}" for what in sorted(set(tally.let_through))[:3]),
        false_restarts=max(0, restarted - tally.deaths),
        slower=show_ratio(during, before),
        health_p99_ms=show_p99(pings),
        recovery_s=f"{recovery:.1f}",
        peak_mib=f"{(peak - memory) / MIB:.0f}" if server.process.pid == first else "",
        figure=tally.figure,
    )


def timed(server: LiveServer, seed: int) -> tuple[httpx.Response | None, float]:
    began = time.monotonic()
    reply = draw(server, seed)
    return reply, time.monotonic() - began


def read(server: LiveServer, tally: Tally) -> None:
    """A cheap good request."""
    tally.offered += 1
    tally.accepted += 1
    try:
        listed = httpx.get(f"{server.url}/v1/models", headers=KEY, timeout=START_LIMIT).json()
        tally.finished += 1
        tally.wrong += "flux/srpo" not in [model["id"] for model in listed["data"]]
    except (httpx.TransportError, LookupError):
        tally.lost += 1
