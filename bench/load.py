"""What our own part of a request costs, compared with the bare pipeline on the same weights.

    srpo bench load [--requests 20] [--clients 32] [--json FILE]

1. One client, one request at a time, safety checker off: seconds end to end over a real loopback port (HTTP, queue,
   worker, JPEG, file) against the seconds of `FluxPipeline.__call__` in this process. The two alternate, so both see
   the same machine. Then a few requests with the checker on, for its own milliseconds.
2. Many clients at once: nothing may be lost; `/health` is timed while the images are drawn.
"""

import asyncio
import os
import statistics
import time
from typing import Any

import httpx

from bench.support.report import make_parser, print_table, write_json
from bench.support.server_process import GENERATIONS, start_server

STEPS = 4
BODY = {
    "model": "flux/srpo",
    "prompt": "a red apple",
    "image_size": "landscape_4_3",
    "num_inference_steps": STEPS,
    "acceleration": "none",
    "enable_safety_checker": False,
}


def measure_one_by_one(url: str, requests: int) -> dict[str, Any]:
    """Alternate bare calls and requests; medians in milliseconds, and the bytes' equality where the format allows."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in the worker: our idle threads must not take its cores
    import torch

    from weights import tiny

    pipeline = tiny.build()
    pipeline.set_progress_bar_config(disable=True)
    bare, served, inference = [], [], []
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
            reply = client.post(GENERATIONS, json=BODY | {"seed": seed})
            served.append(time.perf_counter() - start)
            inference.append(reply.raise_for_status().json()["timings"]["inference"])
        with_checker = BODY | {"enable_safety_checker": True}
        safety = [
            client.post(GENERATIONS, json=with_checker).raise_for_status().json()["timings"]["safety"]
            for _ in range(max(3, requests // 4))
        ]
    over_bare = [whole - part for whole, part in zip(served[2:], bare[2:], strict=True)]
    outside_worker = [whole - part for whole, part in zip(served[2:], inference[2:], strict=True)]
    return {
        "bare_ms": 1000 * statistics.median(bare[2:]),
        "served_ms": 1000 * statistics.median(served[2:]),
        "over_bare_ms": 1000 * statistics.median(over_bare),
        "outside_worker_ms": 1000 * statistics.median(outside_worker),
        "safety_checker_ms": 1000 * statistics.median(safety),
    }


async def measure_all_at_once(url: str, clients: int) -> dict[str, Any]:
    """`clients` requests at the same moment, and `/health` every 20 ms until they are answered."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter()
        posts = [
            asyncio.create_task(client.post(GENERATIONS, json=BODY | {"seed": seed + 1, "image_size": "square"}))
            for seed in range(clients)
        ]
        health = []
        while not all(post.done() for post in posts):
            sent = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            health.append(time.perf_counter() - sent)
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - start
        statuses = [post.result().status_code for post in posts]
    return {
        "clients": clients,
        "lost": clients - statuses.count(201),
        "images_per_second": clients / seconds,
        "health_samples": len(health),
        "health_p50_ms": 1000 * statistics.median(health),
        "health_p99_ms": 1000 * statistics.quantiles(health, n=100)[98],
    }


def main(arguments: list[str]) -> int:
    parser = make_parser("load", __doc__)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args(arguments)
    with start_server() as url:
        figures = {
            "one_by_one": measure_one_by_one(url, options.requests),
            "all_at_once": asyncio.run(measure_all_at_once(url, options.clients)),
        }
    rows = [
        (f"{group}.{name}", f"{value:.1f}" if isinstance(value, float) else str(value))
        for group, values in figures.items()
        for name, value in values.items()
    ]
    print_table("tiny model", ("figure", "value"), rows)
    write_json(figures, options.json)
    return 0
