"""`srpo cluster`: serves from several processes of Ray Serve on this machine (see docs/cluster.md)."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import httpx2
from filelock import FileLock, Timeout
from pydantic import Field
from pydantic_settings import CliPositionalArg

from server import logs
from server.cli.terminal.banner import format_address
from server.cli.terminal.failure import CommandFailed, format_error
from server.cli.terminal.parsing import parse
from server.cli.terminal.start_failure import log_wrong_settings, show_start_failure
from server.cluster.session import Cluster, prepare_environment, running_cluster
from server.cluster.settings import ClusterSettings
from server.extras import missing_extra
from server.process.data_folder import lock_data_folder, make_private
from weights.durable_file import write_durably

INSTALL = missing_extra("a cluster", "ray")
PID = "cluster.pid"  # the process of `up`, and where it serves
LOCK = "cluster.lock"  # which it holds as long as it runs; any server has a lock beside it
OUTCOME = "redeployed"  # the file that says how the last redeployment ended: empty, or why it failed
REDEPLOY = signal.SIGUSR1
ANSWER = 5.0  # seconds
Orders = SimpleQueue[int]  # signals: putting one is safe in a handler


class ClusterCommand(ClusterSettings):
    """`up` serves until it is stopped; `status` says how a cluster is; `down` stops it.

    `redeploy` starts every replica anew, one after another, while the others serve.
    """

    verb: CliPositionalArg[str] = Field(description="up, status, redeploy or down")


def main(arguments: list[str]) -> int | None:
    try:
        settings = parse(ClusterCommand, "cluster", arguments)
    except CommandFailed as failure:
        if "up" not in arguments or not log_wrong_settings("cluster", arguments, failure.problems):
            raise
        return failure.exit_code
    verbs: Mapping[str, Callable[[ClusterSettings], int | None]] = {
        "up": up,
        "status": status,
        "redeploy": redeploy,
        "down": down,
    }
    if settings.verb not in verbs:
        raise CommandFailed(f"{settings.verb!r}: expected up, status, redeploy or down")
    return verbs[settings.verb](settings)


def up(settings: ClusterSettings) -> int:
    """Serve until a signal. What was accepted is finished then. Returns the exit code."""
    logs.configure(settings)
    console = logs.make_console(settings)
    orders = take_orders(REDEPLOY)
    try:
        make_private(settings.data_dir)
        address = format_address(settings, settings.port, own=True)
        with lock_data_folder(settings.data_dir), announced(settings.data_dir, address):
            prepare_environment(settings)
            with running_cluster(settings) as cluster:
                take_orders(signal.SIGTERM, signal.SIGINT, orders=orders)
                console.print(f"Serving on {cluster.address}: {settings.engines} engines. Ctrl-C stops.", markup=False)
                operate(cluster, orders, settings.data_dir, lambda text: console.print(text, markup=False))
                console.print("Stopping: what was accepted is finished.")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        show_start_failure(console, "cluster", INSTALL)
        return 2
    except (OSError, RuntimeError) as error:
        show_start_failure(console, "cluster", format_error(error))
        return 1
    return 0


def take_orders(*numbers: int, orders: Orders | None = None) -> Orders:
    """From now on these signals end up in a queue."""
    queue = orders or Orders()
    for number in numbers:
        signal.signal(number, lambda number, _: queue.put(number))
    return queue


def operate(cluster: Cluster, orders: Orders, folder: Path, say: Callable[[str], None]) -> None:
    """Carry out orders until one of them is to stop. How a redeployment ended is written into a file in `folder`."""
    while orders.get() == REDEPLOY:
        say("Starting every replica anew, while the others serve.")
        try:
            cluster.deploy()
            outcome = ""
        except RuntimeError as error:
            outcome = str(error)
        write_durably(folder / OUTCOME, outcome.encode())
        say(f"Some could not be started: {outcome}" if outcome else "All have been started anew.")


@contextmanager
def announced(folder: Path, address: str) -> Iterator[None]:
    """Let `find_pid` and `find_address` find this process until the context ends, or the process does."""
    write_durably(folder / PID, f"{os.getpid()}\n{address}\n".encode())  # before anybody finds it locked
    lock = FileLock(folder / LOCK, timeout=ANSWER, fallback_to_soft=False)  # a command that looks holds it for a moment
    with suppress(OSError):  # a file system without locks: `lock_data_folder` has warned of it
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def find_pid(settings: ClusterSettings) -> int | None:
    """The process that `up` runs in; None where none does, though `srpo serve` may."""
    path = settings.data_dir / LOCK
    try:
        if path.exists():
            FileLock(path, blocking=False).acquire().__exit__(None, None, None)
    except Timeout:
        return int((settings.data_dir / PID).read_text().split("\n")[0])
    return None


def find_address(settings: ClusterSettings) -> str:
    """Where `up` serves, whatever host and port this command was given."""
    return (settings.data_dir / PID).read_text().splitlines()[1]


def describe_absence(settings: ClusterSettings) -> str:
    return f"no cluster runs in the data folder {settings.data_dir.absolute()}"


def status(settings: ClusterSettings) -> int:
    """0 where a cluster of this data folder answers."""
    pid = find_pid(settings)
    if pid is None:
        print(describe_absence(settings))
        return 1
    address = find_address(settings)
    try:
        url = f"{address}/health"
        health = httpx2.get(url, timeout=ANSWER, trust_env=False).json()  # HTTP_PROXY is no way to this machine
    except (httpx2.HTTPError, ValueError):
        print(f"starting (process {pid}), or not answering on {address}")
        return 1
    print(f"{health['state']}: {health['running']} running, {health['waiting']} waiting (process {pid})")
    return 0


def redeploy(settings: ClusterSettings) -> int:
    """Let the cluster of this data folder replace its replicas, and wait for that. 1 where new ones do not start."""
    pid = find_pid(settings)
    if pid is None:
        print(describe_absence(settings))
        return 1
    outcome = settings.data_dir / OUTCOME
    outcome.unlink(missing_ok=True)
    os.kill(pid, REDEPLOY)
    while not outcome.exists():
        if find_pid(settings) != pid:
            print("the cluster has stopped")
            return 1
        time.sleep(0.1)
    print(outcome.read_text() or "all replicas are new")
    return int(outcome.stat().st_size > 0)


def down(settings: ClusterSettings) -> None:
    """Stop the cluster of this data folder, and wait until it is gone."""
    pid = find_pid(settings)
    if pid is None:
        print(describe_absence(settings))
        return
    os.kill(pid, signal.SIGTERM)
    while find_pid(settings) == pid:
        time.sleep(0.1)
