"""Real clients, each in an environment of its own, against a real server: `make clients` prints which of them work.

The rows stand in `clients.toml`. A row's program is what its user would write, word for word but for the server's
address; what it prints is opened as pictures. What cannot be installed is "not run", never "works". A run of all of
them is kept in `docs/clients.json`, from which the table of `docs/clients.md` is made.
"""

import argparse
import base64
import binascii
import datetime
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from environments import (  # noqa: E402
    ENVIRONMENTS,
    FOLDER,
    ROOT,
    SHOWN,
    Client,
    NotRun,
    carry_out,
    install,
    read_clients,
    reason_of,
)
from support.server import LiveServer, ServerNotReady, free_port, running, wait_ready  # noqa: E402

MATRIX = ROOT / "docs" / "clients.json"
ADDRESS, OTHER_PORT = "http://127.0.0.1:8000", "4000"  # in the programs: the server, and a port they may listen on
START_LIMIT, RUN_LIMIT = 900, 900  # seconds
QUIET = {  # a client under test reports to nobody
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "AGNO_TELEMETRY": "false",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "OTEL_SDK_DISABLED": "true",
    "ANONYMIZED_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "PROMPTFOO_DISABLE_UPDATE": "1",
}


# ---- A row


def run(client: Client, server: LiveServer) -> dict[str, Any]:
    """Carry the client's program out. Returns its row of the matrix, without the date. Raises `NotRun`."""
    if server.process.poll() is not None:
        raise NotRun("the server: it has ended")
    before = len(server.settled_log())
    sizes = []
    try:
        sizes = [picture.size for picture in pictures_in(run_program(client, server))]
        result = "works" if len(sizes) == client.pictures else f"fails: {len(sizes)} of {client.pictures} pictures"
    except (subprocess.SubprocessError, httpx.HTTPError, OSError) as error:  # what is no picture is an OSError
        result = f"fails: {reason_of(getattr(error, 'stderr', None) or str(error))}"
    calls = calls_in(server.settled_log()[before:]) if server.process.poll() is None else []
    return row_of(client, result) | {"calls": calls, "sizes": [f"{width}x{height}" for width, height in sizes]}


def row_of(client: Client, result: str) -> dict[str, Any]:
    names = {"name": client.name, "version": client.version, "program": client.program, "setting": client.setting}
    return names | {"calls": [], "sizes": [], "result": result}


def run_program(client: Client, server: LiveServer) -> str:
    """What the program prints, run in a folder of its own with a picture in it, `apple.png`."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=client.environment))
    try:
        program = folder / f"program{Path(client.program).suffix}"  # under no package's name
        text = (FOLDER / client.program).read_text()
        program.write_text(text.replace(ADDRESS, server.url).replace(OTHER_PORT, str(free_port())))
        Image.new("RGB", (640, 512), "firebrick").save(folder / "apple.png")
        folders = [client.environment / "bin", client.environment / "node_modules" / ".bin", os.environ["PATH"]]
        foreign = re.compile(r"(SRPO|OPENAI|PIP|PYTHON)_|PYTHONPATH|VIRTUAL_ENV")
        env = {name: value for name, value in os.environ.items() if not foreign.match(name)} | QUIET
        env |= {"PATH": os.pathsep.join(map(str, folders)), "HOME": str(folder)}
        command = {".py": "python", ".mjs": "node", ".sh": "sh"}[program.suffix]
        return carry_out([command, program.name], folder, RUN_LIMIT, env)
    finally:
        shutil.rmtree(folder)


def pictures_in(printed: str) -> Iterator[Image.Image]:
    """The pictures among the lines: at a URL, in a data URI or bare base64."""
    for line in map(str.strip, printed.splitlines()):
        if line.startswith("http"):
            yield open_picture(httpx.get(line, timeout=RUN_LIMIT).raise_for_status().content)
        elif line.startswith("data:image/") or len(line) > 1000:
            try:
                yield open_picture(base64.b64decode(line.rpartition(",")[2], validate=True))
            except binascii.Error:
                continue


def open_picture(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def calls_in(log: str) -> list[str]:
    """The requests that the server's log has, without those for pictures and for its own state."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line.get("event") == "request"]
    calls = (f"{line['method']} {line['path']}" for line in requests if line["status"] < 300)
    return list(dict.fromkeys(call for call in calls if not re.search(r" /(files/|ready|health)", call)))


# ---- The matrix


@contextmanager
def serving(setting: str) -> Iterator[LiveServer]:
    """A server with one setting, in the form `SRPO_NAME=value`. Raises `NotRun`."""
    name, _, value = setting.removeprefix("SRPO_").partition("=")
    env: dict[str, Any] = {name.lower(): value} if name else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), wait=False, log_format="json", **env) as server,
    ):
        try:
            wait_ready(server.url, server.process, server.log, START_LIMIT)
        except ServerNotReady as error:
            raise NotRun(f"the server: {reason_of(str(error))}") from error
        yield server


def run_all(clients: Iterable[Client]) -> Iterator[dict[str, Any]]:
    """Every client's row, as soon as it is known."""
    wanted = sorted(clients, key=lambda client: client.setting)
    with ThreadPoolExecutor(2) as threads:
        tasks = {client.environment: client for client in wanted}
        pending = {path: threads.submit(install, client) for path, client in tasks.items()}
        for setting, group in groupby(wanted, key=lambda client: client.setting):
            installed = []
            for client in group:
                try:
                    pending[client.environment].result()
                    installed.append(client)
                except NotRun as error:
                    yield row_of(client, f"not run: {error}"[:SHOWN])
            yield from run_group(installed, setting)


def run_group(clients: list[Client], setting: str) -> Iterator[dict[str, Any]]:
    """The rows of clients that share a server. One that cannot be run does not end the others."""
    left = clients.copy()
    try:
        if left:
            with serving(setting) as server:
                while left:
                    yield run(left[0], server)
                    left.pop(0)
    except NotRun as error:
        yield from (row_of(client, f"not run: {error}"[:SHOWN]) for client in left)


def keep(rows: list[dict[str, Any]]) -> None:
    """Write the rows into `docs/clients.json`, in the order of `clients.toml`, in the place of older ones."""

    def key(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["name"], row["version"].partition(".")[0]

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    known = {key(row): row for row in (json.loads(MATRIX.read_text()) if MATRIX.exists() else [])}
    known |= {key(row): row | {"date": today} for row in rows}
    order = [(client.name, client.version.partition(".")[0]) for client in read_clients()]
    MATRIX.write_text(json.dumps([known[name] for name in order if name in known], indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make clients", description=__doc__)
    parser.add_argument("--light", action="store_true", help="only those that install in seconds; keep no result")
    parser.add_argument("names", nargs="*", help="only clients whose name or program contains one of these")
    chosen = parser.parse_args()
    clients = [
        client
        for client in read_clients()
        if (client.light or not chosen.light)
        and (not chosen.names or any(part in f"{client.name} {client.program}" for part in chosen.names))
    ]
    print(
        f"Python {platform.python_version()}, {len(clients)} clients, environments in {ENVIRONMENTS.name}/", flush=True
    )
    failed = False
    for row in run_all(clients):
        failed |= row["result"].startswith("fails")
        print(row["result"], row["name"], row["version"], row["setting"], ", ".join(row["calls"]), sep="  ", flush=True)
        if not chosen.light:
            keep([row])
    return failed


if __name__ == "__main__":
    sys.exit(main())
