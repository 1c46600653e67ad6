"""What one API process carries: requests a second, and the CPU milliseconds of each part of a request.

    srpo bench api [--clients 1,32,256] [--size 1024x1024] [--seconds 5] [--json FILE]

The engine answers at once with a picture like a photograph, so all that is measured is the server's own part: HTTP,
validation, safety check, encoding, storing, the ledger, JSON, logging. With `--steps` there is another server whose
picture comes from a worker process after so many steps that take no time. CPU time hardly depends on what else runs on
the machine; requests a second do, and the clients of this measurement need a core too.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.support.http_load import Reply, make_get, make_post, send_from_clients, send_in_turn
from bench.support.plans import GOALS, PROMPT, Kind, Plan, parse_mix
from bench.support.report import make_parser, parse_sizes, print_table, write_json
from bench.support.sleeping_engine import dump_plans
from bench.support.stand_in import ALL, LOOP, StandIn, start_stand_in

FORMATS = ("url", "b64_json")
WARM_UP = 5  # requests that do not count
PATIENCE = 600.0  # seconds for a check and its wait for a thread: 256 clients keep more waiting than any card does
Figures = dict[str, Any]


def make_body(size: tuple[int, int], reply: str, safety: bool, steps: int) -> dict[str, Any]:
    return {
        "model": "flux/srpo", "prompt": PROMPT, "image_size": {"width": size[0], "height": size[1]}, "seed": 7,
        "num_inference_steps": steps, "acceleration": "none", "response_format": reply,
        "enable_safety_checker": safety,
    }  # fmt: skip


def measure(server: StandIn, message: bytes, clients: int, seconds: float) -> Figures:
    """Requests a second, latencies, and CPU milliseconds a request: of the process, its event loop, and its threads."""
    check(asyncio.run(send_in_turn(server.port, [message] * WARM_UP)))
    before = server.read_usage()
    replies = asyncio.run(send_from_clients(server.port, message, clients, seconds))
    after = server.read_usage()
    check(replies)
    latencies = sorted(reply.seconds for reply in replies)
    used = {name: 1000 * (value - before.get(name, 0.0)) / len(replies) for name, value in after.items()}
    parts = {name: value for name, value in used.items() if name not in (ALL, LOOP) and value > 0}
    return {
        "clients": clients,
        "requests": len(replies),
        "requests_per_second": clients * len(replies) / sum(latencies),
        "p50_ms": 1000 * statistics.median(latencies),
        "p95_ms": 1000 * latencies[int(0.95 * (len(latencies) - 1))],
        "reply_bytes": len(replies[0].body),
        "cpu_ms": used[ALL],
        "parts_ms": {"event loop": used[LOOP], **dict(sorted(parts.items(), key=lambda item: -item[1]))},
    }


def check(replies: Sequence[Reply]) -> None:
    """Raises `RuntimeError` where one is an error."""
    for reply in replies:
        if reply.status not in (200, 201):
            raise RuntimeError(f"the server answered {reply.status}: {reply.body[:300]!r}")


def measure_all(options: argparse.Namespace) -> Iterator[Figures]:
    (size,) = options.size
    with start_stand_in(safety_timeout=PATIENCE) as server:
        for reply in FORMATS:
            for safety in (True, False):
                message = make_post(make_body(size, reply, safety, 1))
                for clients in options.clients:
                    figures = measure(server, message, clients, options.seconds)
                    yield {"reply": reply, "safety": safety} | figures
        yield {"reply": "GET /v1/models"} | measure(server, make_get("/v1/models"), 1, options.seconds)
    if options.steps:
        (kind,) = parse_mix(f"none:{size[0]}x{size[1]}:{options.steps}@1", {})
        plans = dump_plans([Kind(kind.request, 1.0, Plan(0.0, (0.0,) * options.steps, 0.0))])
        with start_stand_in(1, plans) as server:
            wait_until_ready(server.port)
            message = make_post(make_body(size, "url", True, options.steps))
            figures = measure(server, message, 1, options.seconds)
            yield {"reply": f"url, from a worker, {options.steps} steps", "safety": True} | figures


def wait_until_ready(port: int) -> None:
    """Raises `RuntimeError` where the workers cannot be loaded."""

    async def wait() -> None:
        while (reply := (await send_in_turn(port, [make_get("/ready")]))[0]).status != 200:
            if json.loads(reply.body).get("state") == "failed":
                raise RuntimeError(reply.body.decode())
            await asyncio.sleep(0.05)

    asyncio.run(wait())


def count_cards(rows: Sequence[Figures]) -> Figures:
    """How many cards at the goal speeds a core of CPU carries, and the event loop alone."""
    row = next(row for row in rows if row.get("safety") and row["reply"] == "url")
    return {
        f"{kind.name}, {kind.plan.seconds:g} s": {
            "cards_a_core": 1000 * kind.plan.seconds / row["cpu_ms"],
            "cards_a_loop": 1000 * kind.plan.seconds / row["parts_ms"]["event loop"],
        }
        for kind in parse_mix(GOALS, {})
    }


def show(figures: Figures) -> None:
    rows = figures["rows"]
    print_table(
        f"one API process, {figures['size']} JPEG",
        ("reply", "safety", "clients", "requests/s", "p50 ms", "p95 ms", "CPU ms", "loop ms"),
        [
            (
                row["reply"],
                {True: "on", False: "off"}.get(row.get("safety"), ""),
                str(row["clients"]),
                *(f"{row[name]:.1f}" for name in ("requests_per_second", "p50_ms", "p95_ms", "cpu_ms")),
                f"{row['parts_ms']['event loop']:.2f}",
            )
            for row in rows
        ],
    )
    names = dict.fromkeys(name for row in rows for name in row["parts_ms"])
    shown = [row for row in rows if row["clients"] == rows[0]["clients"]]
    print_table(
        f"CPU ms a request, {rows[0]['clients']} clients",
        ("", *(f"{row['reply']}{', checked' if row.get('safety') else ''}" for row in shown)),
        [(name, *(f"{row['parts_ms'].get(name, 0.0):.2f}" for row in shown)) for name in names],
    )
    print_table(
        "cards at the goal speeds (goals, not results) that one process carries",
        ("", "on one core", "by its event loop, with cores for the rest"),
        [(name, *(f"{count:.0f}" for count in counts.values())) for name, counts in figures["cards"].items()],
    )


def parse_counts(text: str) -> list[int]:
    """Positive numbers, separated by commas. Raises `ValueError`."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def main(arguments: list[str]) -> int:
    parser = make_parser("api", __doc__)
    parser.add_argument("--clients", type=parse_counts, default=[1, 32, 256], help="one case each, by default 1,32,256")
    parser.add_argument("--size", type=parse_sizes, default=[(1024, 1024)])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each case")
    parser.add_argument("--steps", type=int, default=28, help="of the request whose picture a worker sends; 0: none")
    options = parser.parse_args(arguments)
    rows = list(measure_all(options))
    width, height = options.size[0]
    figures = {"size": f"{width}x{height}", "rows": rows, "cards": count_cards(rows)}
    show(figures)
    write_json(figures, options.json)
    return 0
