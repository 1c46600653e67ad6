"""`make ray`: what clients of a cluster notice when a part of it dies or freezes, as a table.

Ray Serve on this machine with logical GPUs, over one Postgres and one bucket. Fails where anything was lost, done twice
without need, or drawn wrongly; where two engines are hardly faster than one; or where Ray takes a control call
without its token.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from support.batch_checks import check_batch, check_memory
from support.buckets import S3Service
from support.cluster_nodes import running_nodes
from support.cluster_site import ClusterSite, running_cluster_site, running_stores
from support.jobs import KEYS, PREFER, call, ended
from support.postgres import Postgres, find_binaries
from support.replicas import BODY, PASSING, PATH, Load, count_work, kill_database, refuse_bucket
from support.waiting import LIMIT, within

REQUESTS = 24
GIVES_UP = 240.0  # seconds: a busy machine starts a cluster slowly
COLUMNS = (
    "case",
    "offered",
    "accepted",
    "finished",
    "lost",
    "duplicated",
    "drawn again",
    "retries",
    "wrong",
    "recovery",
)
SPEEDUP = 1.5  # nearly 2 where the machine has nothing else to do
HEADERS = {"authorization": f"Bearer {KEYS[0]}"}


def nothing(site: ClusterSite) -> None:
    """The row to compare with."""


def kill_engine(site: ClusterSite) -> None:
    site.kill("Engine")


def freeze_engine(site: ClusterSite) -> None:
    site.kill("Engine", signal.SIGSTOP)


def kill_api(site: ClusterSite) -> None:
    site.kill("Api")


def kill_proxy(site: ClusterSite) -> None:
    """Serve's own HTTP server, which all connections end at."""
    (pid,) = site.find("ray::ProxyActor")
    os.kill(pid, signal.SIGKILL)


def redeploy(site: ClusterSite) -> None:
    """Every replica, one after the other."""
    old = {*site.replicas("Api"), *site.replicas("Engine")}
    done = command(site, "redeploy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert within(LIMIT, lambda: not old & {*site.replicas("Api"), *site.replicas("Engine")})


def kill_head(site: ClusterSite) -> None:
    """`up` and all that runs below it; then it is started again, over what Postgres and the bucket have."""
    site.stop(signal.SIGKILL)
    site.start()
    site.wait_ready()


FAULTS: Mapping[str, Callable[[ClusterSite], None]] = {
    "nothing": nothing,
    "an engine is killed": kill_engine,
    "an engine freezes": freeze_engine,
    "the only Api replica is killed": kill_api,
    "Serve's HTTP proxy is killed": kill_proxy,
    "every replica is replaced": redeploy,
    "Postgres is killed, back after 5 s": kill_database,
    "the bucket refuses for 20 s": refuse_bucket,
    "all of Ray is killed, and started again": kill_head,
}


QUICK = ("nothing", "an engine is killed", "an engine freezes", "the only Api replica is killed")


def run_case(
    case: str, site: ClusterSite, fault: Callable[[ClusterSite], None], expected: dict[int, set[str]]
) -> list[str]:
    """Prints a row, and returns what is wrong. `expected`: the digests of each seed's file, filled by the first row."""
    site.wait_ready()
    before = count_work(site)
    load = Load(case, site.url, REQUESTS, {*PASSING, 500}, GIVES_UP)  # Serve's own, as every SDK tries again after it
    over = load.run_through(lambda: fault(site))
    site.wait_settled()
    jobs, objects, retries = (now - then for now, then in zip(count_work(site), before, strict=True))
    row = load.judge(jobs, expected, over) | {"drawn again": objects - REQUESTS, "retries": retries}
    print("| " + " | ".join(str(row[name]) for name in COLUMNS) + " |", flush=True)
    bad = load.list_troubles(row)
    if objects - REQUESTS > retries:
        bad.append(f"{objects - REQUESTS} drawn again, {retries} retries")
    return [f"{case}: {trouble}" for trouble in bad]


def check_contract(site: ClusterSite) -> list[str]:
    """A request, a stream, a job, a cancellation and an error, as a client sees them. Ray's own headers do nothing."""
    bad = []
    with httpx.Client(base_url=site.url, headers=HEADERS, timeout=60) as client:
        ray = {"x-request-timeout-seconds": "0.01", "serve_multiplexed_model_id": "x"}
        reply = client.post(PATH, json=BODY | {"seed": 7}, headers=ray)
        if reply.status_code != 201 or "x-inference-id" not in reply.headers:
            bad.append(f"a request: {reply.status_code} {reply.text}")
        elif client.get(reply.json()["images"][0]["url"]).status_code != 200:
            bad.append("its image cannot be read")
        streamed = client.post(PATH, json=BODY | {"seed": 7, "stream": True, "partial_images": 2}).text
        names = [line.removeprefix("event: ") for line in streamed.split("\n") if line.startswith("event: ")]
        if names[-1:] != ["image_generation.completed"] or names.count("image_generation.partial_image") != 2:
            bad.append(f"a stream: {names}")
        wrong = client.post(PATH, json=BODY | {"num_inference_steps": 0})
        if wrong.status_code != 400 or "error" not in wrong.json():
            bad.append(f"a wrong request: {wrong.status_code}")
        if httpx.post(f"{site.url}{PATH}", json=BODY).status_code != 401:
            bad.append("a request without a key was taken")
        long = call(site, "POST", PATH, json=BODY | {"num_inference_steps": 50}, headers=PREFER).json()["id"]
        assert within(LIMIT, lambda: call(site, "GET", f"/v1/jobs/{long}").json()["status"] == "running")
        call(site, "DELETE", f"/v1/jobs/{long}")
        if (status := ended(site, long)["status"]) != "cancelled":
            bad.append(f"a cancelled job: {status}")
    return bad


def check_disconnect(site: ClusterSite) -> list[str]:
    """The work of a client that goes away ends, also if it asks Ray to go on."""
    with socket.create_connection(("127.0.0.1", int(site.url.rpartition(":")[2]))) as connection:
        body = json.dumps(BODY | {"num_inference_steps": 50}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEYS[0]}\r\n"
        head += "x-request-disconnect-disabled: ?1\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert within(LIMIT, lambda: running(site) == 1)
    begun = time.monotonic()
    assert within(LIMIT, lambda: running(site) == 0)
    return [] if time.monotonic() - begun < 1.5 else ["the work of a client that had gone went on"]  # it takes 2.5 s


def running(site: ClusterSite) -> int:
    number: int = httpx.get(f"{site.url}/health", timeout=10).json()["running"]
    return number


def check_control(site: ClusterSite) -> list[str]:
    """Ray's own address refuses whoever has no token, or a wrong one."""
    address = site.log.read_text().rpartition("control: ")[2].split()[0].rstrip('",')  # it may end a string of JSON
    program = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('accepted')"
    bad = []
    for case, more in {"no token": {}, "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}}.items():
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with tempfile.TemporaryDirectory() as home:
            tried = subprocess.run(
                [sys.executable, "-c", program, address],
                env=clean | {"HOME": home} | more,
                capture_output=True,
                text=True,
                timeout=90,
                check=False,
            )
        if "accepted" in tried.stdout or "token" not in tried.stderr.lower():
            bad.append(f"a control call with {case}: {tried.stdout} {tried.stderr[-300:]}")
    return bad


def measure_rate(site: ClusterSite) -> float:
    """Images a minute, of engines that sleep 2.5 s an image, where enough are asked for at once."""
    site.wait_ready()
    body = BODY | {"num_inference_steps": 50, "num_images": 4}

    def draw(_: int) -> None:
        httpx.post(f"{site.url}{PATH}", json=body, headers=HEADERS, timeout=120).raise_for_status()

    begun = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(draw, range(4)))
    return 16 * 60 / (time.monotonic() - begun)


def command(site: ClusterSite, verb: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "server", "cluster", verb]
    return subprocess.run(words, env=site.env, capture_output=True, text=True, timeout=LIMIT, check=False)


def check_command(folder: Path, stores: tuple[Postgres, S3Service]) -> list[str]:
    """`srpo cluster up`, `status` and `down`, with an engine on the CPU that draws the tiny model's pictures."""
    bad = []
    with running_cluster_site(folder, stores, 1, "server", "cluster", "up", "--engine-gpus", "0") as site:
        status = command(site, "status")
        if status.returncode or "ready" not in status.stdout:
            bad.append(f"status: {status.stdout}{status.stderr}")
        drawn = httpx.post(f"{site.url}{PATH}", json=BODY | {"num_inference_steps": 1}, headers=HEADERS, timeout=120)
        if drawn.status_code != 201:
            bad.append(f"an image: {drawn.status_code}")
        down = command(site, "down")
        if down.returncode or site.process.wait(10) or command(site, "status").returncode != 1:
            bad.append(f"down: {down.stdout}{down.stderr}{site.log.read_text()}")
    return bad


def check_nodes(folder: Path, stores: tuple[Postgres, S3Service], expected: dict[int, set[str]]) -> list[str]:
    """The row of a node that is lost. It is started again afterwards, and its engine comes back."""
    with running_nodes(folder, stores) as (site, worker):

        def kill_node(site: ClusterSite) -> None:
            worker.kill()
            worker.start()

        return run_case("the other node is killed, and started again", site, kill_node, expected)


def check_several(folder: Path, stores: tuple[Postgres, S3Service], expected: dict[int, set[str]]) -> list[str]:
    """The row of an `Api` replica that is lost while there is another one."""
    with running_cluster_site(folder, stores, 2, apis="2") as site:
        return run_case("one of two Api replicas is killed", site, kill_api, expected)


def main(arguments: list[str]) -> int:
    if importlib.util.find_spec("ray") is None or not find_binaries():
        print("Ray (the extra `ray`) or Postgres is not installed, so this is not tried")
        return 0
    troubles, expected = [], dict[int, set[str]]()
    with tempfile.TemporaryDirectory() as folder, running_stores() as stores:
        with running_cluster_site(Path(folder, "two"), stores, 2) as site:
            for check in (check_contract, check_disconnect, check_control):
                bad = check(site)
                print(f"{check.__name__.removeprefix('check_')}: {bad or 'as it should be'}", flush=True)
                troubles += bad
            two = measure_rate(site)
            print("| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), sep="\n", flush=True)
            for case, fault in FAULTS.items():
                if case in QUICK or "--all" in arguments:
                    troubles += run_case(case, site, fault, expected)
        if "--all" in arguments:
            bad = check_batch(Path(folder, "batch"), stores[1]) + check_memory()
            print(f"batch: {bad or 'as it should be'}", flush=True)
            troubles += bad
            for check_site in (check_several, check_nodes):
                troubles += check_site(Path(folder, check_site.__name__), stores, expected)
        with running_cluster_site(Path(folder, "one"), stores, 1) as site:
            one = measure_rate(site)
        bad = check_command(Path(folder, "command"), stores)
        print(f"command: {bad or 'as it should be'}", flush=True)
        troubles += bad
    print(f"images a minute: {one:.1f} by one engine, {two:.1f} by two ({two / one:.2f} times)")
    if two < SPEEDUP * one:
        troubles.append("two engines are hardly faster than one")
    print(*troubles, sep="\n")
    return bool(troubles)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
