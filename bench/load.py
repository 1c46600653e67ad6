"""What our own part of a request costs, beside the bare pipeline on the same weights, in one run.

    python -m bench.load [--requests 20] [--clients 32] [--json FILE]

1. One client, one request at a time, safety checker off: seconds end to end over a real loopback port (HTTP, queue,
   worker, JPEG, file) against the seconds of `FluxPipeline.__call__` in this process. The two alternate, so both see
   the same machine. Then a few requests with the checker on, for its own milliseconds.
2. Many clients at once: nothing may be lost; `/health` is timed while the images are drawn.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

STEPS = 4
BODY = {
    "model": "flux/srpo",
    "prompt": "a red apple",
    "image_size": "landscape_4_3",
    "num_inference_steps": STEPS,
    "acceleration": "none",
    "enable_safety_checker": False,
}


@contextmanager
def server(model: str = "tiny") -> Iterator[str]:
    """A real `srpo serve` on a free port; yields its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "server",
            "serve",
            "--port",
            str(port),
            "--data-dir",
            folder,
            "--model",
            model,
        ]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"SRPO_QUEUE_SIZE": "1000"})
        try:
            while not is_ready(url):
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def one_by_one(url: str, requests: int) -> dict[str, Any]:
    """Alternate bare calls and requests; medians in milliseconds, and the bytes' equality where the format allows."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in the worker: our idle threads must not take its cores
    import torch

    from weights import tiny

    pipeline = tiny.build()
    pipeline.set_progress_bar_config(disable=True)
    bare, served, engine = [], [], []
    with httpx.Client(base_url=url, timeout=600) as client:
        for seed in range(1, requests + 3):
            start = time.perf_counter()
            generator = torch.Generator("cpu").manual_seed(seed)
            pipeline(
                "a red apple",
                width=1024,
                height=768,
                num_inference_steps=STEPS,
                guidance_scale=4.5,
                generator=generator,
                max_sequence_length=tiny.TEXT_TOKENS,
            )
            bare.append(time.perf_counter() - start)
            start = time.perf_counter()
            reply = client.post("/v1/images/generations", json=BODY | {"seed": seed})
            served.append(time.perf_counter() - start)
            engine.append(reply.raise_for_status().json()["timings"]["inference"])
        with_checker = BODY | {"enable_safety_checker": True}
        safety = [
            client.post("/v1/images/generations", json=with_checker).raise_for_status().json()["timings"]["safety"]
            for _ in range(max(3, requests // 4))
        ]
    over = [whole - part for whole, part in zip(served[2:], bare[2:], strict=True)]
    ours = [whole - part for whole, part in zip(served[2:], engine[2:], strict=True)]
    return {
        "bare_ms": 1000 * statistics.median(bare[2:]),
        "served_ms": 1000 * statistics.median(served[2:]),
        "over_bare_ms": 1000 * statistics.median(over),
        "outside_worker_ms": 1000 * statistics.median(ours),
        "safety_checker_ms": 1000 * statistics.median(safety),
    }


async def all_at_once(url: str, clients: int) -> dict[str, Any]:
    """`clients` requests at the same moment, and `/health` every 20 ms until they are answered."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter()
        posts = [
            asyncio.create_task(
                client.post("/v1/images/generations", json=BODY | {"seed": seed + 1, "image_size": "square"})
            )
            for seed in range(clients)
        ]
        health = []
        while not all(post.done() for post in posts):
            asked = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            health.append(time.perf_counter() - asked)
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - start
        answered = [post.result().status_code for post in posts]
    return {
        "clients": clients,
        "lost": clients - answered.count(201),
        "images_per_second": clients / seconds,
        "health_samples": len(health),
        "health_p50_ms": 1000 * statistics.median(health),
        "health_p99_ms": 1000 * statistics.quantiles(health, n=100)[98],
    }


def show(figures: dict[str, Any]) -> None:
    table = Table("figure", "value", title="bench.load, tiny model")
    for group, values in figures.items():
        for name, value in values.items():
            table.add_row(f"{group}.{name}", f"{value:.1f}" if isinstance(value, float) else str(value))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with server() as url:
        figures = {
            "one_by_one": one_by_one(url, arguments.requests),
            "all_at_once": asyncio.run(all_at_once(url, arguments.clients)),
        }
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
