"""`srpo cluster`: serves from several processes of Ray Serve on this machine (see docs/cluster.md)."""

import os
import signal
import sys
import threading
import time

import httpx2
from filelock import FileLock, Timeout
from pydantic import Field
from pydantic_settings import CliPositionalArg

from server import logs
from server.cli.parsing import format_error, parse
from server.cluster.session import prepare_environment, running_cluster
from server.cluster.settings import ClusterSettings
from server.data_folder import lock_data_folder, make_private
from server.extras import missing_extra

INSTALL = missing_extra("a cluster", "ray")
LOCK = "server.lock"
ANSWER = 5.0  # seconds
VERBS = ("up", "status", "down")


class ClusterCommand(ClusterSettings):
    """`up` serves until it is stopped; `status` says how a cluster is; `down` stops it."""

    verb: CliPositionalArg[str] = Field(description="up, status or down")


def main(arguments: list[str]) -> int:
    settings = parse(ClusterCommand, "cluster", arguments)
    if settings.verb not in VERBS:
        print(f"srpo cluster: {settings.verb!r}: expected up, status or down", file=sys.stderr)
        return 2
    return {"up": up, "status": status, "down": down}[settings.verb](settings)


def up(settings: ClusterSettings) -> int:
    """Serve until a signal. What was accepted is finished then."""
    logs.configure(settings)
    console = logs.make_console(settings)
    over = threading.Event()
    try:
        make_private(settings.data_dir)
        with lock_data_folder(settings.data_dir):
            prepare_environment(settings)
            with running_cluster(settings) as address:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: over.set())
                console.print(f"Serving on {address}: {settings.engines} engines. Ctrl-C stops.", markup=False)
                over.wait()
                console.print("Stopping: what was accepted is finished.")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        print(f"srpo cluster: {INSTALL}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"srpo cluster: {format_error(error)}", file=sys.stderr)
        return 1
    return 0


def find_pid(settings: ClusterSettings) -> int | None:
    """The process that `up` runs in; None where none does."""
    path = settings.data_dir / LOCK
    try:
        if path.exists():
            FileLock(path, blocking=False).acquire().__exit__(None, None, None)
    except Timeout:
        return int(path.read_text())
    return None


def status(settings: ClusterSettings) -> int:
    """0 where a cluster of this data folder answers."""
    pid = find_pid(settings)
    if pid is None:
        print("no cluster runs here")
        return 1
    try:
        health = httpx2.get(f"http://{settings.host}:{settings.port}/health", timeout=ANSWER).json()
    except (httpx2.HTTPError, ValueError):
        print(f"starting (process {pid}), or not answering")
        return 1
    print(f"{health['state']}: {health['running']} running, {health['waiting']} waiting (process {pid})")
    return 0


def down(settings: ClusterSettings) -> int:
    """Stop the cluster of this data folder, and wait until it is gone."""
    pid = find_pid(settings)
    if pid is None:
        print("no cluster runs here")
        return 0
    os.kill(pid, signal.SIGTERM)
    while find_pid(settings) == pid:
        time.sleep(0.1)
    return 0
