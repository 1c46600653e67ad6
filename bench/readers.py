"""What clients that hang or leave in the middle of their streams cost the others, in latency and memory.

    srpo bench readers [--rounds 3] [--json FILE]

Each round streams 100 requests (`tiny`, three previews each) from a real server twice: once all clients read to the
end, once 30 never read and 30 leave after their first bytes. The latency is that of the clients that read to the end,
from their post to the last byte. The memory is the API process's after each round, when the hung clients have gone.
"""

import asyncio
import json
import socket
import statistics
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx

from bench.support.memory import MIB, read_memory
from bench.support.report import make_parser, print_table, write_json
from bench.support.server_process import GENERATIONS, api_pid, start_server

BODY = {
    "model": "flux/srpo", "prompt": "a red apple", "image_size": "square", "num_inference_steps": 4, "stream": True,
    "partial_images": 3,
}  # fmt: skip


def open_hanging_stream(url: str, *, leave: bool) -> socket.socket:
    """Send a request and read nothing, or with `leave` disconnect after the first bytes."""
    data = json.dumps(BODY).encode()
    address = urlsplit(url)
    sock = socket.create_connection((address.hostname or "", address.port or 0))
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
    sock.sendall(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
    if leave:
        sock.recv(1)
        sock.close()
    return sock


async def read_stream(client: httpx.AsyncClient) -> float:
    """Seconds from the post to the last byte."""
    start = time.perf_counter()
    reply = await client.post(GENERATIONS, json=BODY)
    assert "event: image_generation.completed" in reply.text, reply.text[:500]
    return time.perf_counter() - start


async def stream_all(url: str, readers: int, hanging: int, leaving: int) -> list[float]:
    """Seconds that each of `readers` waited while others hang or leave."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        with ExitStack() as stack:
            others = [
                asyncio.to_thread(open_hanging_stream, url, leave=number < leaving)
                for number in range(leaving + hanging)
            ]
            reading = [asyncio.ensure_future(read_stream(client)) for _ in range(readers)]
            for sock in await asyncio.gather(*others):
                stack.callback(sock.close)
            return await asyncio.gather(*reading)


async def wait_until_idle(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        while (status := (await client.get("/health")).json())["running"] or status["waiting"]:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)


async def measure(url: str, rounds: int, readers: int, hanging: int, leaving: int) -> dict[str, Any]:
    pid, total = api_pid(url), readers + hanging + leaving
    await stream_all(url, total, 0, 0)  # caches, allocator
    figures: dict[str, Any] = {"memory_before_mib": read_memory("VmRSS", pid) / MIB}
    undisturbed: list[float] = []
    disturbed: list[float] = []
    memory: list[float] = []
    for _ in range(rounds):
        undisturbed += await stream_all(url, total, 0, 0)
        await wait_until_idle(url)
        disturbed += await stream_all(url, readers, hanging, leaving)
        await wait_until_idle(url)
        memory.append(read_memory("VmRSS", pid) / MIB)
    for name, seconds in (("all_read", undisturbed), ("some_do_not", disturbed)):
        figures |= {
            f"{name}_p50_s": statistics.median(seconds),
            f"{name}_p95_s": statistics.quantiles(seconds, n=20)[18],
        }
    return figures | {f"memory_after_round_{number}_mib": value for number, value in enumerate(memory, 1)}


def main(arguments: list[str]) -> int:
    parser = make_parser("readers", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    for name, count in (("read", 40), ("hang", 30), ("leave", 30)):
        parser.add_argument(f"--{name}", type=int, default=count, help="readers of that kind")
    options = parser.parse_args(arguments)
    with start_server() as url:
        figures = asyncio.run(measure(url, options.rounds, options.read, options.hang, options.leave))
    title = f"{options.read + options.hang + options.leave} streams"
    print_table(title, ("figure", "value"), [(name, f"{value:.2f}") for name, value in figures.items()])
    write_json(figures, options.json)
    return 0
