"""`make soak`: half an hour of mixed requests, and how memory, descriptors, threads, database and disk grow (SOAK=600:
ten minutes). Images and jobs expire meanwhile, so nothing should grow for ever.

The slopes are those of a straight line through what was measured after the first quarter, in which caches fill.
"""

import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from faults.good import GOOD, KEY, PATH, health
from support.jobs import KEYS, PREFER
from support.server import LiveServer, running

SECONDS = float(os.environ.get("SOAK", "1800"))
CLIENTS = 6
KEPT = 60.0  # seconds for which images are kept
SAMPLES = 120
SETTINGS: dict[str, Any] = {"api_keys": ",".join(KEYS), "safety_checker": "none", "images_expire": str(KEPT)}
UNITS = {"API memory": "MiB", "worker memory": "MiB", "database": "KiB", "database's journal": "KiB", "disk": "MiB"}
WARM_UP = 0.25  # of the time
COLUMNS = ("figure", "after the warm-up", "at the end", "most", "slope an hour", "slope per 1,000 requests")


class Traffic:
    """Clients of many kinds, until `stop`. `done` counts their requests by kind and status."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._going = True
        self.done: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._going = False
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        kinds = (self._draw, self._draw_as_job, self._ask_badly, self._leave, self._read)
        with self._server.client(headers=KEY) as client:
            while self._going:
                (kind,) = chance.choices(kinds, (4, 2, 4, 1, 4))
                try:
                    status: object = kind(client, chance)
                except httpx.TransportError as error:
                    status = type(error).__name__
                self.done[f"{kind.__name__.strip('_')} {status}"] += 1

    def _draw(self, client: httpx.Client, chance: random.Random) -> object:
        body = GOOD | {"seed": chance.randint(1, 2**31), "prompt": str(chance.random()), "response_format": "url"}
        reply = client.post(PATH, json=body)
        return client.get(reply.json()["images"][0]["url"]).status_code if reply.is_success else refusal(reply)

    def _draw_as_job(self, client: httpx.Client, chance: random.Random) -> object:
        body = GOOD | {"seed": chance.randint(1, 2**31), "num_images": 2}
        reply = client.post(PATH, json=body, headers={**PREFER, "idempotency-key": str(chance.random())})
        if not reply.is_success:
            return refusal(reply)
        return client.get(f"/v1/jobs/{reply.json()['id']}/events").status_code

    def _ask_badly(self, client: httpx.Client, chance: random.Random) -> int:
        return client.post(PATH, content=chance.randbytes(chance.randint(0, 10_000))).status_code

    def _leave(self, client: httpx.Client, chance: random.Random) -> str:
        with suppress(httpx.TimeoutException):
            httpx.post(self._server.url + PATH, json=GOOD | {"num_inference_steps": 20}, headers=KEY, timeout=0.2)
        return "left"

    def _read(self, client: httpx.Client, chance: random.Random) -> int:
        return client.get(
            chance.choice(["/v1/models", "/v1/jobs?limit=100", "/health", "/metrics", "/nothing"])
        ).status_code


def refusal(reply: httpx.Response) -> str:
    return f"{reply.json()['error']['code']} {reply.status_code}"


def look(server: LiveServer, requests: int) -> dict[str, float]:
    """The figures now; memory in bytes."""
    process = psutil.Process(server.process.pid)
    [worker] = health(server)["worker_pids"]
    files = [path.stat().st_size for path in (server.data_dir / "images").rglob("*") if path.is_file()]
    return {
        "seconds": time.monotonic(),
        "requests": requests,
        "API memory": process.memory_info().rss / 2**20,
        "worker memory": psutil.Process(worker).memory_info().rss / 2**20,
        "API descriptors": process.num_fds(),
        "worker descriptors": psutil.Process(worker).num_fds(),
        "API threads": process.num_threads(),
        "worker threads": psutil.Process(worker).num_threads(),
        "database": (server.data_dir / "jobs.sqlite3").stat().st_size / 2**10,
        "database's journal": sum(path.stat().st_size for path in server.data_dir.glob("jobs.sqlite3-*")) / 2**10,
        "disk": sum(files) / 2**20,
        "images": len(files),
    }


def show(samples: list[dict[str, float]]) -> None:
    print("| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), sep="\n")
    hours = [sample["seconds"] / 3600 for sample in samples]
    thousands = [sample["requests"] / 1000 for sample in samples]
    for name in list(samples[0])[2:]:
        values = [sample[name] for sample in samples]
        unit = f" {UNITS[name]}" if name in UNITS else ""
        slopes = [statistics.linear_regression(over, values).slope for over in (hours, thousands)]
        cells = [f"{value:.0f}{unit}" for value in (values[0], values[-1], max(values))]
        print("| " + " | ".join([name, *cells, *(f"{slope:+.2f}{unit}" for slope in slopes)]) + " |")


def main() -> int:
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), **SETTINGS) as server:
        traffic = Traffic(server)
        traffic.start()
        try:
            began = time.monotonic()
            while time.monotonic() < began + SECONDS:
                time.sleep(SECONDS / SAMPLES)
                if time.monotonic() > began + WARM_UP * SECONDS:
                    with suppress(FileNotFoundError):  # an image that expires meanwhile
                        samples.append(look(server, traffic.done.total()))
        finally:
            traffic.stop()
        restarts = health(server)["restarts"]
        show(samples)
    print(f"\n{SECONDS:.0f} s, {traffic.done.total()} requests, {restarts} restarts of the worker")
    print(", ".join(f"{kind}: {count}" for kind, count in sorted(traffic.done.items())))
    failed = [kind for kind in traffic.done if kind.split()[-1].startswith("5") or "Error" in kind]
    return bool(failed or restarts)


if __name__ == "__main__":
    sys.exit(main())
