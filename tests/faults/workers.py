"""Faults of processes: workers and servers that are killed, stopped or cannot be started, by real signals."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from resource import RLIMIT_NOFILE, prlimit

import httpx
import psutil
from faults.good import GOOD, KEY, PATH, Jobs, draw, draw_quietly, health, judge_reply
from faults.outcome import Fault, Hold, Server, Tally
from support.server import START_LIMIT, LiveServer
from support.tcp_proxy import Mode, proxy_to
from support.waiting import within

BUDGET = 6.0  # seconds that a worker may be silent
SATURATION = float(os.environ.get("SATURATION", "20"))  # seconds
PLAIN = Server("plain")
WATCHED = Server("watched", {"worker_timeout": str(BUDGET), "shutdown_grace": f"{START_LIMIT:.0f}"})
NOFILE_LEFT = 3
PLACES = 64 + 16  # that wait and that run, by default


def worker(server: LiveServer) -> int:
    """The worker's process id, as soon as there is one."""
    pids: list[int] = []

    def look() -> bool:
        pids[:] = health(server)["worker_pids"]
        return bool(pids)

    assert within(START_LIMIT, look)
    return pids[0]


def state(server: LiveServer) -> str:
    found: str = health(server)["state"]
    return found


def strike(server: LiveServer, tally: Tally, number: int) -> int:
    """Send the worker a signal that ends it, or makes the server end it."""
    pid = worker(server)
    os.kill(pid, number)
    tally.struck = tally.struck or time.monotonic()
    tally.deaths += 1
    return pid


def wait_replaced(server: LiveServer, tally: Tally, pid: int, since: float) -> None:
    """Until the process is gone. Says after how much of its budget."""
    assert within(START_LIMIT, lambda: not psutil.pid_exists(pid))
    tally.figure = f"ended after {(time.monotonic() - since) / BUDGET:.2f} budgets"


@contextmanager
def killed_at_work(server: LiveServer, tally: Tally, kills: int = 1, count: int = 8, steps: int = 10) -> Iterator[None]:
    jobs = Jobs(server, tally, count, steps)
    for _ in range(kills):
        assert within(START_LIMIT, lambda: state(server) == "ready")
        jobs.wait_running()
        pid = strike(server, tally, signal.SIGKILL)
        assert within(START_LIMIT, lambda pid=pid: not psutil.pid_exists(pid))  # type: ignore[misc]
    yield
    jobs.settle()


@contextmanager
def killed_thrice(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Work is left for others each time: a job that two workers died with, alone, fails, whoever killed them."""
    with killed_at_work(server, tally, kills=3, count=16, steps=30):
        yield


@contextmanager
def stopped_idle(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Nobody asks for anything until the server has found out."""
    pid = strike(server, tally, signal.SIGSTOP)
    wait_replaced(server, tally, pid, time.monotonic())
    yield


@contextmanager
def stopped_at_work(server: LiveServer, tally: Tally) -> Iterator[None]:
    jobs = Jobs(server, tally, 4, steps=40)
    jobs.wait_running()
    pid, since = strike(server, tally, signal.SIGSTOP), time.monotonic()
    wait_replaced(server, tally, pid, since)
    yield
    jobs.settle()


@contextmanager
def stopped_while_loading(server: LiveServer, tally: Tally) -> Iterator[None]:
    first = strike(server, tally, signal.SIGKILL)
    assert within(START_LIMIT, lambda: worker(server) != first)
    pid, since = strike(server, tally, signal.SIGSTOP), time.monotonic()
    wait_replaced(server, tally, pid, since)
    yield


@contextmanager
def stopped_with_impatient_clients(server: LiveServer, tally: Tally) -> Iterator[None]:
    """A request every half second, whose client leaves after a second: neither sets the clock back."""
    going = True

    def ask_and_leave() -> None:
        while going:
            with suppress(httpx.TransportError):
                httpx.post(server.url + PATH, json=GOOD, headers=KEY, timeout=1.0)
            time.sleep(0.5)

    asking = threading.Thread(target=ask_and_leave)
    pid, since = strike(server, tally, signal.SIGSTOP), time.monotonic()
    asking.start()
    try:
        wait_replaced(server, tally, pid, since)
        yield
    finally:
        going = False
        asking.join()


@contextmanager
def no_descriptors(server: LiveServer, tally: Tally) -> Iterator[None]:
    """The worker dies while the server may open no file: no process can be started."""
    pid = worker(server)
    soft, hard = prlimit(server.process.pid, RLIMIT_NOFILE)
    connection = httpx.Client(base_url=server.url, headers=KEY, timeout=START_LIMIT)  # one that is open already
    with connection:
        connection.get("/health")
        prlimit(server.process.pid, RLIMIT_NOFILE, (NOFILE_LEFT, hard))
        try:
            os.kill(pid, signal.SIGKILL)
            tally.struck = time.monotonic()
            assert within(
                START_LIMIT, lambda: "no worker process" in (connection.get("/health").json()["failure"] or "")
            )
            tally.figure = f"/ready says {connection.get('/ready').json()['state']}"
        finally:
            prlimit(server.process.pid, RLIMIT_NOFILE, (soft, hard))
        tally.deaths += connection.get("/health").json()["restarts"] - tally.deaths
    yield


@contextmanager
def stopped_server(server: LiveServer, tally: Tally) -> Iterator[None]:
    """The server's own process is stopped, for longer than a worker may be silent, and goes on."""
    jobs = Jobs(server, tally, 4)
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(1.5 * BUDGET)
    os.kill(server.process.pid, signal.SIGCONT)
    tally.struck = time.monotonic()
    yield
    jobs.settle()


@contextmanager
def killed_server(server: LiveServer, tally: Tally) -> Iterator[None]:
    """With six durable jobs, and one request whose client asks again with the same idempotency key."""
    key, wanted = {"idempotency-key": f"killed {time.time_ns()}"}, draw_quietly(server, 9, 10)
    jobs = Jobs(server, tally, 6)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(draw, server, 9, 10, **key)
        jobs.wait_running()
        server.process.kill()
        server.process.wait()
        tally.struck = time.monotonic()
        first.result()
        server.start_again()
        server.wait_ready()
        judge_reply(tally, draw(server, 9, 10, **key), wanted)
    yield
    jobs.settle(others=1)


@contextmanager
def terminated_server(server: LiveServer, tally: Tally) -> Iterator[None]:
    """With six requests that are waited for, and three durable jobs; then another one takes its place."""
    wanted = {seed: draw_quietly(server, seed, 30) for seed in range(1, 7)}
    with ThreadPoolExecutor(6) as threads:
        replies = {seed: threads.submit(draw, server, seed, 30) for seed in wanted}

        def taken() -> int:
            """How many of them the server has taken: who comes after the signal is refused."""
            done = sum(reply.done() for reply in replies.values())
            found = health(server)
            return done + int(found["running"]) + int(found["waiting"])

        assert within(START_LIMIT, lambda: taken() >= 6)
        jobs = Jobs(server, tally, 3)
        server.process.send_signal(signal.SIGTERM)
        for seed, reply in replies.items():
            judge_reply(tally, reply.result(), wanted[seed])
    code = server.process.wait(START_LIMIT)
    tally.figure = f"exit code {code}"
    tally.struck = time.monotonic()
    server.start_again()
    server.wait_ready()
    yield
    jobs.settle()


def bad_network(mode: Mode) -> Hold:
    """A client asks through a network that gets bad, and twice again with the same key when it is well: the second of
    these is not drawn.
    """

    @contextmanager
    def hold(server: LiveServer, tally: Tally) -> Iterator[None]:
        body = GOOD | {"seed": 5, "num_inference_steps": 50}
        with proxy_to(server.port) as network, httpx.Client(base_url=f"http://127.0.0.1:{network.port}") as client:
            error: BaseException | None = None
            while error is None:  # a reply that came before the network was bad says nothing
                headers = {**KEY, "idempotency-key": f"{mode} {time.time_ns()}"}
                with ThreadPoolExecutor(1) as threads:
                    asked = threads.submit(client.post, PATH, json=body, headers=headers, timeout=4.0)
                    assert within(START_LIMIT, lambda: health(server)["running"] > 0 or asked.done())  # noqa: B023
                    network.mode = mode
                    error = asked.exception()
                    network.mode = "pass"
            assert isinstance(error, httpx.TransportError)
            tally.struck = time.monotonic()
            wanted = draw_quietly(server, 5, 50)
            for _ in range(2):
                reply = client.post(PATH, json=body, headers=headers, timeout=START_LIMIT)
                judge_reply(tally, reply, wanted)
            tally.duplicated += reply.headers.get("idempotent-replayed") != "true"
        yield

    return hold


@contextmanager
def sixteen_at_once(server: LiveServer, tally: Tally) -> Iterator[None]:
    """Requests that share steps, and whose bytes are those of the same requests alone."""
    wanted = {seed: draw_quietly(server, seed, 10) for seed in range(1, 17)}
    with ThreadPoolExecutor(16) as threads:
        replies = {seed: threads.submit(draw, server, seed, 10) for seed in wanted}
        for seed, reply in replies.items():
            judge_reply(tally, reply.result(), wanted[seed])
    yield


@contextmanager
def saturated(server: LiveServer, tally: Tally) -> Iterator[None]:
    """More clients than places, for `SATURATION` seconds. Whoever is refused comes back when it is told to."""
    until = time.monotonic() + SATURATION
    wanted = {seed: draw_quietly(server, seed) for seed in range(1, 5)}
    lock, advice = threading.Lock(), list[str]()

    def insist(number: int) -> None:
        while time.monotonic() < until:
            seed = number % 4 + 1
            reply = draw(server, seed)
            with lock:
                judge_reply(tally, reply, wanted[seed])
            if reply is not None and reply.status_code == 429:
                advice.append(reply.headers["retry-after"])
                time.sleep(min(float(reply.headers["retry-after"]), max(0.0, until - time.monotonic())))

    clients = [threading.Thread(target=insist, args=(number,)) for number in range(90)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    tally.figure = f"{SATURATION:.0f} s, 90 clients, {len(advice)} refused"
    yield


@contextmanager
def full_queue(server: LiveServer, tally: Tally) -> Iterator[None]:
    """All places taken at once, and eight clients more: what they are told, beside what then happens."""
    wanted, began = draw_quietly(server, 1), time.monotonic()
    ends, told = list[float](), list[float]()

    def post() -> None:
        reply = draw(server, 1)
        judge_reply(tally, reply, wanted)
        if reply is not None and reply.status_code == 429:
            told.append(int(reply.headers["retry-after-ms"]) / 1000 + time.monotonic() - began)
        else:
            ends.append(time.monotonic() - began)

    clients = [threading.Thread(target=post) for _ in range(PLACES + 8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if told:
        tally.figure = f"`retry-after` said {min(told):.1f} to {max(told):.1f} s; the work ahead took {max(ends):.1f} s"
        tally.figure += f" ({min(told) / max(ends):.1f} to {max(told) / max(ends):.1f} times), a place was free at "
        tally.figure += f"{min(ends):.1f} s"
    yield


FAULTS = (
    Fault("16 requests at once", "4", sixteen_at_once, PLAIN),
    Fault("8 clients more than places", "3", full_queue, PLAIN),
    Fault("90 clients for 80 places, for long", "3", saturated, PLAIN),
    Fault("the worker is killed, 8 jobs", "1 5", killed_at_work, WATCHED),
    Fault("the worker is killed three times, 16 jobs", "D15", killed_thrice, WATCHED),
    Fault("the worker stops, idle", "2 D3", stopped_idle, WATCHED),
    Fault("the worker stops in a step", "2 D1", stopped_at_work, WATCHED),
    Fault("the worker stops while it loads", "2 31 D3", stopped_while_loading, WATCHED),
    Fault("the worker stops, clients are impatient", "2 D1", stopped_with_impatient_clients, WATCHED),
    Fault("no worker can be spawned", "40 D2", no_descriptors, WATCHED),
    Fault("the server stops for 9 s", "31", stopped_server, WATCHED),
    Fault("a client's network loses replies", "30 35", bad_network("lose-answers"), WATCHED),
    Fault("a client's network is half open", "30 35", bad_network("hold"), WATCHED),
    Fault("the server is killed, 6 jobs", "29 30", killed_server, WATCHED),
    Fault("the server is terminated, 9 requests", "29", terminated_server, WATCHED),
)
