"""What readers that hang or leave in the middle of their streams cost the others: latency and memory.

    srpo bench readers [--rounds 3] [--json FILE]

Each round streams 100 requests (`tiny`, three previews each) from a real server twice: once every reader reads to the
end, once 30 never read and 30 leave after their first bytes. Compared is what the other readers wait from their post to
the last byte; memory is the API process's, after every round. Hung readers are let go after each round.
"""

import argparse
import asyncio
import json
import socket
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from rich.console import Console
from rich.table import Table

from bench.load import server

PATH = "/v1/images/generations"
BODY = {
    "model": "flux/srpo", "prompt": "a red apple", "image_size": "square", "num_inference_steps": 4, "stream": True,
    "partial_images": 3,
}  # fmt: skip


def memory_of(pid: int) -> float:
    """Resident MiB of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def api_process(url: str) -> int:
    """The parent of the server's worker."""
    worker = httpx.get(f"{url}/health").json()["worker_pids"][0]
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def hang(url: str, *, leave: bool) -> socket.socket:
    """A reader that sends its request and reads nothing; or leaves after its first bytes."""
    data = json.dumps(BODY).encode()
    address = urlsplit(url)
    sock = socket.create_connection((address.hostname or "", address.port or 0))
    head = f"POST {PATH} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
    sock.sendall(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
    if leave:
        sock.recv(1)
        sock.close()
    return sock


async def read(client: httpx.AsyncClient) -> float:
    """Seconds from the post to the last byte."""
    start = time.perf_counter()
    reply = await client.post(PATH, json=BODY)
    assert "event: image_generation.completed" in reply.text, reply.text[:500]
    return time.perf_counter() - start


async def crowd(url: str, readers: int, hanging: int, leaving: int) -> list[float]:
    """Seconds that each of `readers` waited beside readers that hang or leave."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        with ExitStack() as stack:
            others = [asyncio.to_thread(hang, url, leave=number < leaving) for number in range(leaving + hanging)]
            reading = [asyncio.ensure_future(read(client)) for _ in range(readers)]
            for sock in await asyncio.gather(*others):
                stack.callback(sock.close)
            return await asyncio.gather(*reading)


async def idle(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        while (status := (await client.get("/health")).json())["running"] or status["waiting"]:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)


async def measure(url: str, rounds: int, readers: int, hanging: int, leaving: int) -> dict[str, Any]:
    pid, everybody = api_process(url), readers + hanging + leaving
    await crowd(url, everybody, 0, 0)  # caches, allocator
    figures: dict[str, Any] = {"memory_before_mib": memory_of(pid)}
    alone: list[float] = []
    beside: list[float] = []
    memory: list[float] = []
    for _ in range(rounds):
        alone += await crowd(url, everybody, 0, 0)
        await idle(url)
        beside += await crowd(url, readers, hanging, leaving)
        await idle(url)
        memory.append(memory_of(pid))
    for name, seconds in (("all_read", alone), ("some_do_not", beside)):
        figures |= {
            f"{name}_p50_s": statistics.median(seconds),
            f"{name}_p95_s": statistics.quantiles(seconds, n=20)[18],
        }
    return figures | {f"memory_after_round_{number}_mib": value for number, value in enumerate(memory, 1)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "srpo bench readers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    for name, count in (("read", 40), ("hang", 30), ("leave", 30)):
        parser.add_argument(f"--{name}", type=int, default=count, help="readers of that kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with server() as url:
        figures = asyncio.run(measure(url, options.rounds, options.read, options.hang, options.leave))
    table = Table("figure", "value", title=f"{options.read + options.hang + options.leave} streams")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
