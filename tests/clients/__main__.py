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
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
sys.path[:0] = [str(ROOT), str(FOLDER.parent)]
from support.server import LiveServer, free_port, running  # noqa: E402

ENVIRONMENTS = ROOT / ".clients"
MATRIX = ROOT / "docs" / "clients.json"
ADDRESS, OTHER_PORT = "http://127.0.0.1:8000", "4000"  # in the programs: the server, and a port they may listen on
INSTALL_LIMIT, RUN_LIMIT = 1800, 900  # seconds
SHOWN = 200  # characters of a reason
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


class NotRun(Exception):
    """The client could not be installed here."""


@dataclass(frozen=True)
class Client:
    """A row of `clients.toml`."""

    name: str
    install: tuple[tuple[str, ...], ...]
    program: str
    pictures: int
    setting: str = ""
    light: bool = False

    @property
    def uses_npm(self) -> bool:
        return self.program.endswith(".mjs") or any("@" in part[1:] for line in self.install for part in line)

    @property
    def environment(self) -> Path:
        """Clients that install the same share it."""
        text = "+".join(part for line in self.install for part in line) or "none"
        return ENVIRONMENTS / re.sub(r"[^\w.+=-]+", "-", text).strip("-")

    @property
    def version(self) -> str:
        if not self.install:
            return subprocess.run([self.name, "--version"], capture_output=True, text=True).stdout.split()[1]
        first = next(part for part in self.install[0] if not part.startswith("-"))
        return re.split(r"==|(?<=.)@", first)[-1]


def read_clients() -> list[Client]:
    rows = tomllib.loads((FOLDER / "clients.toml").read_text())["client"]
    return [Client(**row | {"install": tuple(tuple(line) for line in row["install"])}) for row in rows]


# ---- Installing


def install(client: Client) -> None:
    """Make the client's environment, once. Raises `NotRun`."""
    folder = client.environment
    mark = folder / ".installed"
    if mark.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        (install_with_npm if client.uses_npm else install_with_pip)(client, folder)
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NotRun(said[-1]) from error
    mark.touch()


def install_with_npm(client: Client, folder: Path) -> None:
    (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefer-offline", "--save-exact"]
    for line in client.install:
        carry_out(["npm", "install", "--prefix", str(folder), *options, *line], folder)


def install_with_pip(client: Client, folder: Path) -> None:
    carry_out([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    site = next(folder.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    for line in client.install:
        carry_out([*pip, "install", "--quiet", *line], site)


def carry_out(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_LIMIT)


# ---- Running


def run(client: Client, server: LiveServer) -> dict[str, Any]:
    """Carry the client's program out. Returns its row of the matrix, without the date."""
    row = {"name": client.name, "version": client.version, "program": client.program, "setting": client.setting}
    before = len(server.settled_log())
    try:
        printed = run_program(client, server)
        calls = calls_in(server.settled_log()[before:])
        sizes = [picture.size for picture in pictures_in(printed)]
        result = "works" if len(sizes) == client.pictures else f"fails: {len(sizes)} of {client.pictures} pictures"
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        calls, sizes = calls_in(server.settled_log()[before:]), []
        result = f"fails: {next((line.strip() for line in reversed(said) if 'rror' in line), said[-1])[:SHOWN]}"
    return row | {"calls": calls, "sizes": [f"{width}x{height}" for width, height in sizes], "result": result}


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
        ended = subprocess.run(
            [command, program.name], cwd=folder, env=env, check=True, capture_output=True, text=True, timeout=RUN_LIMIT
        )
        return ended.stdout
    finally:
        shutil.rmtree(folder)


def pictures_in(printed: str) -> Iterator[Image.Image]:
    """The pictures among the lines: at a URL, in a data URI or bare base64."""
    for line in map(str.strip, printed.splitlines()):
        if line.startswith("http"):
            yield open_picture(httpx.get(line).raise_for_status().content)
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
    """A server with one setting, in the form `SRPO_NAME=value`."""
    name, _, value = setting.removeprefix("SRPO_").partition("=")
    env = {name.lower(): value} if name else {}
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), log_format="json", **env) as server:
        yield server


def run_all(clients: Iterable[Client]) -> Iterator[dict[str, Any]]:
    """Every client's row, as soon as it is known."""
    wanted = sorted(clients, key=lambda client: client.setting)
    failures: dict[Path, str] = {}

    def prepare(environment: Path, client: Client) -> None:
        try:
            install(client)
        except NotRun as error:
            failures[environment] = str(error)

    with ThreadPoolExecutor(2) as threads:
        tasks = {client.environment: client for client in wanted}
        pending = {path: threads.submit(prepare, path, client) for path, client in tasks.items()}
        for setting, group in groupby(wanted, key=lambda client: client.setting):
            with serving(setting) as server:
                for client in group:
                    pending[client.environment].result()
                    if client.environment in failures:
                        result = f"not run: {failures[client.environment][:SHOWN]}"
                        yield {"name": client.name, "version": client.version, "program": client.program} | {
                            "setting": setting,
                            "calls": [],
                            "sizes": [],
                            "result": result,
                        }
                    else:
                        yield run(client, server)


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
