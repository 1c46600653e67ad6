"""How much a number of cards carries: latencies, refusals, images a day, the cost of an image.

    srpo bench capacity [--devices 1,8,1000] [--load 0.5,0.8] [--mix MIX] [--times FILE] [--price 2.5] [--json FILE]
    srpo bench capacity --check [--model flux/sketch]

Requests of a mix come at random moments (a Poisson stream) to servers of up to `--per-server` cards. The server's own
pool admits, refuses and dispatches them in simulated time. MIX is a list of kinds, separated by commas, each
PRESET:WIDTHxHEIGHT:STEPS=SHARE@SECONDS. Without SECONDS a kind takes what `--times` says, a file that
`srpo bench engine --json` has written. Without `--mix` the kinds have the project's goals for a card, which are no
results.

`--check` holds the simulation against the real server on this machine. Engines that sleep, or a model that draws, get
the arrivals that are simulated, and what was predicted is printed beside what was measured.
"""

import argparse
import asyncio
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.api import check as check_replies
from bench.api import wait_until_ready
from bench.support.http_load import Reply, make_post, send_at, send_in_turn
from bench.support.plans import FORM, GOALS, Kind, parse_mix, plan_from_timings, read_times
from bench.support.report import make_parser, print_table, write_json
from bench.support.server_process import start_server
from bench.support.simulation import Limits, Visit, draw_arrivals, simulate
from bench.support.sleeping_engine import dump_plans
from bench.support.stand_in import start_stand_in

HOST_MS, CPU_MS = 60.0, 80.0  # of a checked picture of a megapixel: bench/LOG.md, 2026-11-27
TRIES = 5  # of each kind alone, before a check and after it
DAY = 86400
Figures = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What became of a stream of requests. Seconds are those of requests that were answered with images."""

    requests: int
    refused: float  # share
    p50_s: float
    p95_s: float
    images_per_second: float

    @classmethod
    def of(cls, seconds: Sequence[float], requests: int, images: int, end: float) -> "Summary":
        """`seconds` of each request that was answered; `images` of all of them; `end`: when the last one was."""
        ordered = sorted(seconds) or [float("nan")]
        p95 = ordered[int(0.95 * (len(ordered) - 1))]
        return cls(requests, 1 - len(seconds) / requests, statistics.median(ordered), p95, images / end)


def summarize(visits: Sequence[Visit], host: float) -> Summary:
    """`host`: seconds of each request that are not the device's."""
    answered = [visit for visit in visits if visit.ended is not None]
    seconds = [visit.ended - visit.arrived + host for visit in answered if visit.ended is not None]
    images = sum(len(visit.kind.request.seeds) for visit in answered)
    return Summary.of(seconds, len(visits), images, max((visit.ended or visit.arrived) + host for visit in visits))


def mean_seconds(kinds: Sequence[Kind]) -> float:
    """On a device, of a request of the mix."""
    return sum(kind.share * kind.plan.seconds for kind in kinds) / sum(kind.share for kind in kinds)


def predict(kinds: Sequence[Kind], options: argparse.Namespace, devices: int, load: float) -> Figures:
    """Many devices are many servers alike, each of which gets its part of the requests at random."""
    servers = ceil(devices / options.per_server)
    each = ceil(devices / servers)
    limits = Limits(each, options.queue_size, options.max_running)
    visits = draw_arrivals(kinds, load * each / mean_seconds(kinds), options.requests, options.seed)
    simulate(limits, visits)
    summary = summarize(visits, options.host_ms / 1000)
    images = summary.images_per_second * devices / each
    return {
        "devices": devices,
        "servers": servers,
        "load": load,
        "requests_per_second": load * devices / mean_seconds(kinds),
        "refused": summary.refused,
        "p50_s": summary.p50_s,
        "p95_s": summary.p95_s,
        "images_per_day": images * DAY,
        "usd_per_1000_images": 1000 * options.price * devices / (images * 3600),
        "api_cores": images * options.cpu_ms / 1000,
    }


def show(rows: Sequence[Figures], options: argparse.Namespace) -> None:
    print_table(
        f"{options.mix}\n{options.price:g} USD a device-hour, {options.cpu_ms:g} CPU ms an image for the API",
        (
            "cards",
            "servers",
            "load",
            "requests/s",
            "p50 s",
            "p95 s",
            "refused",
            "images a day",
            "USD/1000",
            "API cores",
        ),
        [
            (
                str(row["devices"]),
                str(row["servers"]),
                f"{row['load']:.2f}",
                f"{row['requests_per_second']:.1f}",
                f"{row['p50_s']:.2f}",
                f"{row['p95_s']:.2f}",
                f"{row['refused']:.2%}",
                f"{row['images_per_day']:,.0f}",
                f"{row['usd_per_1000_images']:.2f}",
                f"{row['api_cores']:.1f}",
            )
            for row in rows
        ],
    )


# --- against the real server ----------------------------------------------------------------------------------------


@contextmanager
def start_checked(kinds: Sequence[Kind], options: argparse.Namespace) -> Iterator[int]:
    """The port of the real server, which has drawn each kind once."""
    limits = {"queue_size": options.queue_size, "max_running": options.max_running}
    if options.model is None:
        with start_stand_in(options.devices[0], dump_plans(kinds), **limits) as server:
            wait_until_ready(server.port)
            try_alone(server.port, kinds, 1)
            yield server.port
        return
    flags = [text for name, value in limits.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with start_server(options.model, *flags) as url:
        port = urlsplit(url).port or 0
        try_alone(port, kinds, 1)
        yield port


def try_alone(port: int, kinds: Sequence[Kind], rounds: int) -> list[list[dict[str, Any]]]:
    """The timings of the kinds, one request at a time: a list of each round, in the order of the kinds.

    In rounds, since how fast shared cores are changes within a minute.
    """
    tried = []
    for _ in range(rounds):
        replies = asyncio.run(send_in_turn(port, [make_post(kind.body) for kind in kinds]))
        check_replies(replies)
        tried.append([timings_of(reply) for reply in replies])
    return tried


def with_measured_plans(kinds: Sequence[Kind], rounds: Sequence[Sequence[dict[str, Any]]]) -> list[Kind]:
    """How long requests wait follows from the mean, not from the median."""
    return [
        replace(kind, plan=plan_from_timings(kind.request, means_of(rows)))
        for kind, *rows in zip(kinds, *rounds, strict=True)
    ]


def timings_of(reply: Reply) -> dict[str, Any]:
    timings: dict[str, Any] = json.loads(reply.body)["timings"]
    return timings


def means_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in rows) for name in ("text", "denoise", "decode")}


def check(kinds: Sequence[Kind], options: argparse.Namespace) -> Figures:
    """The same arrivals, sent and simulated. What a request takes beside the engine is this run's median.

    A model's seconds alone are measured before and after, and the simulation has those of both.
    """
    devices = options.devices[0] if options.model is None else 1
    with start_checked(kinds, options) as port:
        alone = try_alone(port, kinds, TRIES) if options.model else []
        drawn = with_measured_plans(kinds, alone) if alone else kinds
        rate = options.load[0] * devices / mean_seconds(drawn)
        count = max(1, round(rate * options.seconds))
        visits = draw_arrivals(drawn, rate, count, options.seed)
        replies = asyncio.run(send_at(port, [(visit.arrived, make_post(visit.kind.body)) for visit in visits]))
        if alone:
            drawn = with_measured_plans(kinds, alone + try_alone(port, kinds, TRIES))
    visits = draw_arrivals(drawn, rate, count, options.seed)
    simulate(Limits(devices, options.queue_size, options.max_running), visits)
    answered = [(visit, reply) for visit, reply in zip(visits, replies, strict=True) if reply.status in (200, 201)]
    check_replies([reply for reply in replies if reply.status != 429])
    timings = [timings_of(reply) for _, reply in answered]
    host = statistics.median(
        reply.seconds - row["queue"] - row["inference"] for (_, reply), row in zip(answered, timings, strict=True)
    )
    end = max(visit.arrived + reply.seconds for visit, reply in zip(visits, replies, strict=True))
    images = sum(len(visit.kind.request.seeds) for visit, _ in answered)
    return {
        "devices": devices,
        "host_s": host,
        "kinds": {kind.name: kind.plan.seconds for kind in drawn},
        "predicted": vars(summarize(visits, host)),
        "measured": vars(Summary.of([reply.seconds for _, reply in answered], len(visits), images, end)),
    }


def show_check(figures: Figures) -> None:
    predicted, measured = figures["predicted"], figures["measured"]
    print_table(
        f"{measured['requests']} requests, {figures['devices']} engines, {figures['host_s']:.3f} s beside the engine",
        ("", "predicted", "measured", "difference"),
        [
            (name, f"{predicted[name]:.3f}", f"{measured[name]:.3f}", difference(predicted[name], measured[name]))
            for name in ("p50_s", "p95_s", "refused", "images_per_second")
        ],
    )


def difference(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.1%}" if measured else "-"


# --- the command line -----------------------------------------------------------------------------------------------


def parse_numbers(text: str) -> list[float]:
    """Positive numbers, separated by commas. Raises `ValueError`."""
    numbers = [float(part) for part in text.split(",")]
    if not all(0 < number < float("inf") for number in numbers):
        raise ValueError(text)
    return numbers


def parse_devices(text: str) -> list[int]:
    return [int(number) for number in parse_numbers(text)]


def make_capacity_parser() -> argparse.ArgumentParser:
    parser = make_parser("capacity", __doc__)
    parser.add_argument("--devices", type=parse_devices, default=[1, 2, 4, 8, 64, 1000], help="cards; a row for each")
    parser.add_argument("--load", type=parse_numbers, default=[0.8], help="requests, as a share of what the cards draw")
    parser.add_argument("--mix", default=GOALS, help=f"kinds of requests: {FORM}, separated by commas")
    parser.add_argument("--times", type=Path, metavar="FILE", help="what `srpo bench engine --json` has written")
    parser.add_argument("--per-server", type=int, default=8, help="cards of a server at most")
    parser.add_argument("--queue-size", type=int, default=64, help="as the server's setting")
    parser.add_argument("--max-running", type=int, default=16, help="as the server's setting")
    parser.add_argument("--host-ms", type=float, default=HOST_MS, help="of a request, beside the card's time")
    parser.add_argument("--cpu-ms", type=float, default=CPU_MS, help="of the API for a request (`srpo bench api`)")
    parser.add_argument("--price", type=float, default=2.5, help="USD for a device and hour")
    parser.add_argument("--requests", type=int, default=4000, help="to simulate at each server")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals")
    parser.add_argument("--check", action="store_true", help="send the first row's requests to a real server, too")
    parser.add_argument("--model", help="for --check: draw with this model, on one device, instead of sleeping")
    parser.add_argument("--seconds", type=float, default=60.0, help="for --check: how long requests come")
    return parser


def main(arguments: list[str]) -> int:
    parser = make_capacity_parser()
    options = parser.parse_args(arguments)
    try:
        measured = read_times(options.times) if options.times else {}
        kinds = parse_mix(options.mix, measured)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if min(options.per_server, options.max_running, options.requests, options.seconds) <= 0 or options.queue_size < 0:
        parser.error("--per-server, --max-running, --requests and --seconds are positive, --queue-size is not negative")
    if options.check:
        figures = check(kinds, options)
        show_check(figures)
    else:
        rows = [predict(kinds, options, devices, load) for devices in options.devices for load in options.load]
        show(rows, options)
        figures = {"mix": options.mix, "rows": rows}
    write_json(figures, options.json)
    return 0
