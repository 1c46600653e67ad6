"""A row of the matrix, and its client's environment: what `clients.toml` says, installed on its own."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
ENVIRONMENTS = ROOT / ".clients"
INSTALL_LIMIT = 1800  # seconds
SHOWN = 200  # characters of a reason
NOISE = re.compile(r"complete log of this run|notsup (Actual|Not comp)")  # npm's last lines


class NotRun(Exception):
    """The client could not be installed here, or its server could not be started."""


@dataclass(frozen=True)
class Client:
    """A row of `clients.toml`."""

    name: str
    install: tuple[tuple[str, ...], ...]
    program: str
    pictures: int
    setting: str = ""
    light: bool = False
    sources: str = ""  # an npm package that is unpacked into `sources/`, without what it depends on
    missing: str = ""  # why it cannot be installed anywhere

    @property
    def uses_npm(self) -> bool:
        return self.program.endswith(".mjs") or any("@" in part[1:] for line in self.install for part in line)

    @property
    def environment(self) -> Path:
        """Clients that install the same share it."""
        parts = [part for line in self.install for part in line] + [self.sources] * bool(self.sources)
        text = "+".join(parts) or (self.name if self.missing else "none")
        return ENVIRONMENTS / re.sub(r"[^\w.+=-]+", "-", text).strip("-")

    @property
    def version(self) -> str:
        if self.missing:
            return "none"
        if not self.install:
            return subprocess.run([self.name, "--version"], capture_output=True, text=True).stdout.split()[1]
        first = self.sources or next(part for part in self.install[0] if not part.startswith("-"))
        return re.split(r"==|(?<=.)@", first)[-1]


def read_clients() -> list[Client]:
    rows = tomllib.loads((FOLDER / "clients.toml").read_text())["client"]
    return [Client(**row | {"install": tuple(map(tuple, row["install"]))}) for row in rows]


# ---- Installing


def install(client: Client) -> None:
    """Make the client's environment, once. Raises `NotRun`."""
    if client.missing:
        raise NotRun(client.missing)
    folder = client.environment
    mark = folder / ".installed"
    if mark.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        (install_with_npm if client.uses_npm else install_with_pip)(client, folder)
    except (subprocess.SubprocessError, OSError) as error:
        raise NotRun(reason_of(getattr(error, "stderr", None) or str(error))) from error
    mark.touch()


def install_with_npm(client: Client, folder: Path) -> None:
    (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefer-offline", "--save-exact"]
    for line in client.install:
        carry_out(["npm", "install", "--prefix", str(folder), *options, *line], folder, INSTALL_LIMIT)
    if client.sources:
        packed = carry_out(["npm", "pack", "--loglevel=error", client.sources], folder, INSTALL_LIMIT).split()[-1]
        with tarfile.open(folder / packed) as archive:
            archive.extractall(folder / "sources", filter="data")


def install_with_pip(client: Client, folder: Path) -> None:
    carry_out([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder, INSTALL_LIMIT)
    site = next(folder.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    for line in client.install:
        carry_out([*pip, "install", "--quiet", "--no-compile", *line], site, INSTALL_LIMIT)


# ---- Commands


def carry_out(command: list[str], folder: Path, limit: float, env: Mapping[str, str] | None = None) -> str:
    """What a command prints. Whatever it has started ends with it. Raises `SubprocessError` with its stderr."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    executable = shutil.which(command[0], path=env["PATH"]) if env else None
    with subprocess.Popen(
        command, cwd=folder, env=env, executable=executable, start_new_session=True, **pipes
    ) as process:
        try:
            printed, said = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise subprocess.SubprocessError(f"it did not end within {limit:.0f} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed, said)
    return printed


def reason_of(said: str) -> str:
    """The line that says what went wrong: the last one with "error" in it, or the last."""
    lines = [line for line in said.strip().splitlines() if not NOISE.search(line)] or ["it said nothing"]
    return next((line.strip() for line in reversed(lines) if "rror" in line), lines[-1])[:SHOWN]
