"""`srpo serve`: the app on a socket, with a banner."""

import asyncio
import fcntl
import os
import signal
import socket
import sys
from pathlib import Path
from typing import IO

import uvicorn
from rich.console import Console

from pipelines.errors import SafetyUnavailable
from pipelines.workers.pool import WorkerPool
from server import logs
from server.api.malformed import EnvelopeProtocol
from server.app import create_app
from server.cli import banner
from server.cli.parsing import format_error, parse
from server.settings import Settings
from server.state import AppState

KEEP_ALIVE = 75  # seconds: longer than the idle time of common proxies and SDK connection pools
UNREAD = 60  # seconds a reply may lie unread before its connection is given up
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: the weights or the checker cannot be loaded


def main(arguments: list[str]) -> int:
    settings = parse(Settings, "serve", arguments)
    logs.configure(settings)
    try:
        app = create_app(settings)
        claimed = claim(settings.data_dir)
        listener = listen(settings)
    except SafetyUnavailable as error:
        print(f"srpo serve: the safety checker: {error.cause}. Without one: --safety-checker none", file=sys.stderr)
        return EXIT_CONFIG
    except (OSError, ValueError) as error:
        print(f"srpo serve: {format_error(error)}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app,
        http=EnvelopeProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=settings.forwarded_allow_ips is not None,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=settings.shutdown_grace,
    )
    server = DrainingServer(config, app.state.app_state)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn takes them over, and raises them again after a clean end
    with claimed:
        return asyncio.run(run(server, app.state.app_state, listener))


class DrainingServer(uvicorn.Server):
    """uvicorn, which tells the pool and the operator at the first signal that no more work is taken."""

    def __init__(self, config: uvicorn.Config, parts: AppState) -> None:
        super().__init__(config)
        self._parts = parts
        self.console = Console(stderr=True, highlight=False)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._parts.pool.drain()
        banner.show_stopping(self.console, self._parts)
        await super().shutdown(sockets)


async def run(server: DrainingServer, parts: AppState, listener: socket.socket) -> int:
    """Serve until a signal, or until the model turns out not to load."""
    console = server.console
    address = banner.format_address(parts.settings, listener.getsockname()[1])
    banner.show_start(console, parts, address)
    announcing = asyncio.create_task(banner.follow_loading(console, parts, address))
    failing = asyncio.create_task(stop_if_failed(server, parts.pool))
    try:
        await server.serve([listener])
    finally:
        announcing.cancel()
        failing.cancel()
    if parts.pool.failed.is_set():
        console.print(f"[red]The model cannot be loaded.[/]\n{parts.pool.status().failure}", soft_wrap=True)
        return EXIT_CONFIG
    console.print("Stopped.")
    return 0


async def stop_if_failed(server: DrainingServer, pool: WorkerPool) -> None:
    await pool.failed.wait()
    server.should_exit = True


def claim(folder: Path) -> IO[str]:
    """Hold the data folder until the file is closed: two servers on one would both carry out its unfinished jobs."""
    file = (folder / "server.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise OSError(
            f"another server (pid {owner}) uses the data folder {folder}. Choose another one with --data-dir"
        ) from None
    except OSError as error:  # a network file system without locks
        print(
            f"srpo serve: {folder} cannot be locked ({error.strerror}): see that no other server uses it",
            file=sys.stderr,
        )
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def listen(settings: Settings) -> socket.socket:
    """A bound socket: a port that is taken is an error before anything is loaded."""
    family, kind, proto, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # a reader that no longer reads: its connection would hold its image for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD * 1000)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose another port with --port"
        ) from error
    return listener
