"""A real Postgres on a loopback port, from Debian's package, as a user without rights, in a folder of its own."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.server import free_port
from support.waiting import LIMIT, within

PASSWORD = "pg-Canary-7w3Kq"  # must not be found anywhere
FAST = ("fsync=off", "max_connections=60", "unix_socket_directories=", "shared_buffers=16MB")  # only the power can fail


def find_binaries() -> Path | None:
    if found := shutil.which("postgres"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


class Postgres:
    """One server process with its folder. It can be killed and started again."""

    def __init__(self, binaries: Path, folder: Path, user: str | None) -> None:
        self.port = free_port()
        self._binaries = binaries
        self._folder = folder
        self._user: dict[str, Any] = {"user": user} if user else {}
        self._process: subprocess.Popen[bytes] | None = None
        self._names = count(1)

    def initialize(self) -> None:
        password = self._folder / "password"
        password.write_text(PASSWORD)
        options = ["--username=srpo", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync", "--encoding=UTF8"]
        command: list[str | Path] = [self._binaries / "initdb", "-D", self._folder / "data", *options]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder, **self._user)

    def start(self) -> None:
        """After `kill` some tries may fail: what is left of its sessions holds its memory until it has noticed."""
        assert within(LIMIT, self._is_up), (self._folder / "log").read_text()

    def _is_up(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            self._spawn()
        return self._answers()

    def _spawn(self) -> None:
        settings = (*FAST, "listen_addresses=127.0.0.1", f"port={self.port}")
        flags = [part for setting in settings for part in ("-c", setting)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._folder / "data", *flags],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
                **self._user,
            )

    def kill(self) -> None:
        """Without a word. Its sessions, groups of their own, end as soon as they notice."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)  # fast shutdown
            self._process.wait()

    def create_database(self) -> str:
        """The URL of a new one."""
        name = f"test_{next(self._names)}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._address(name)

    def _address(self, name: str, port: int | None = None) -> str:
        return f"postgresql://srpo:{PASSWORD}@127.0.0.1:{port or self.port}/{name}"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._address("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Skips the test where there is none."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("Postgres is not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="srpo-postgres-"))
    user = None
    if os.geteuid() == 0:  # Postgres refuses to run as root
        user = "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"
        shutil.chown(folder, user)
    postgres = Postgres(binaries, folder, user)
    try:
        postgres.initialize()
        postgres.start()
        yield postgres
    finally:
        if postgres._process is not None:
            postgres.stop()
        shutil.rmtree(folder)
