"""`srpo serve`: the app on a socket, with a banner."""

import asyncio
import os
import resource
import signal
import socket
import sys

import prometheus_client
import structlog
import uvicorn
from rich.text import Text

from pipelines.errors import SafetyUnavailable
from pipelines.workers.pool import WorkerPool
from server import logs
from server.app import ImageServer, create_app, served_headers
from server.cli.stopping import DrainingServer, leave_if_threads_hang
from server.cli.terminal import banner
from server.cli.terminal.failure import CommandFailed, format_error
from server.cli.terminal.parsing import parse
from server.cli.terminal.start_failure import log_wrong_settings, show_start_failure
from server.errors import StorageFailure
from server.process import memory
from server.process.data_folder import lock_data_folder, make_private
from server.settings.server import Settings
from server.settings.types import find_unknown_variables
from server.start_check import NotNow, check_data_folder
from server.state import AppState
from server.transport.protocol import ConnectionLimits, limited_protocol

KEEP_ALIVE = 75  # seconds: longer than the idle time of common proxies and SDK connection pools
UNREAD = 60  # seconds that a client may leave its reply unread before the connection is closed
OTHER_FILES = 200  # descriptors for all that is no connection: images, the database, workers, hooks
EXIT_NOT_NOW = 75  # EX_TEMPFAIL of sysexits.h: starting again later may help
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h: the weights or the checker cannot be loaded
log = structlog.get_logger("srpo")


def main(arguments: list[str]) -> int:
    try:
        settings = parse(Settings, "serve", arguments)
    except CommandFailed as failure:
        if not log_wrong_settings("serve", arguments, failure.problems):
            raise
        return failure.exit_code
    memory.fix_thresholds()
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody here asks for
    logs.configure(settings)
    console = logs.make_console(settings)
    for name, nearest in find_unknown_variables(os.environ, Settings).items():
        log.warning("unknown_setting", name=name, nearest=nearest)
    try:
        make_private(settings.data_dir)
        lock = lock_data_folder(settings.data_dir)  # before anything looks into it: the store sweeps what has expired
        app = create_app(settings)
        check_data_folder(settings.data_dir, settings.damaged_data, app.parts.database)
        app.parts.key_service.load()
        listeners = [listen(settings.host, settings.port, "--port")]
        if settings.metrics and settings.metrics_port is not None:
            listeners.append(listen(settings.metrics_host, settings.metrics_port, "--metrics-port"))
    except SafetyUnavailable as error:
        cause = f"the safety checker: {error.cause}. Without one: --safety-checker none"
        show_start_failure(console, "serve", cause)
        return EXIT_CONFIG
    except (NotNow, StorageFailure) as error:
        show_start_failure(console, "serve", str(error))
        return EXIT_NOT_NOW
    except (OSError, ValueError) as error:
        show_start_failure(console, "serve", format_error(error))
        return 2
    server = DrainingServer(configure_server(app, settings), app.parts, app.jobs, console)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn handles them while it serves, and raises them again at its end; one that comes before counts too.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    with lock:
        code = asyncio.run(run(server, app.parts, app.jobs.replica, listeners))
        leave_if_threads_hang(app.parts, code)
    return code


def configure_server(app: ImageServer, settings: Settings) -> uvicorn.Config:
    """uvicorn with our protocol and its deadlines."""
    limits = ConnectionLimits(
        settings.header_timeout,
        settings.body_timeout,
        limit_connections(settings),
        app.parts.metrics.count_connection,
        served_headers(app.parts.served),
    )
    return uvicorn.Config(
        app,
        http=limited_protocol(limits),
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


async def run(server: DrainingServer, parts: AppState, replica: str, listeners: list[socket.socket]) -> int:
    """Serve until a signal to stop. Returns the exit code, `EXIT_CONFIG` if the model cannot be loaded."""
    console = server.console
    address = banner.format_address(parts.settings, listeners[0].getsockname()[1])
    banner.show_start(console, parts, address, replica)
    announcing = asyncio.create_task(banner.follow_loading(console, parts, address))
    failing = asyncio.create_task(stop_if_failed(server, parts.pool))
    try:
        await server.serve(listeners)
    finally:
        announcing.cancel()
        failing.cancel()
    if parts.pool.failed.is_set():
        failure = f"\n{parts.pool.status().failure}"
        reason = Text.assemble(("The model cannot be loaded.", "red"), failure)
        show_start_failure(console, "serve", reason)
        return EXIT_CONFIG
    console.print("Stopped.")
    return 0


async def stop_if_failed(server: DrainingServer, pool: WorkerPool) -> None:
    await pool.failed.wait()
    server.should_exit = True


def limit_connections(settings: Settings) -> int:
    """How many connections may be open: as many as set, where the hard limit of open files allows it.

    The soft limit, often 1024, is raised to the hard one. Descriptors are needed for images and workers too.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = settings.max_connections
    if hard != resource.RLIM_INFINITY and limit > hard - OTHER_FILES:
        limit = max(1, hard - OTHER_FILES)
        log.warning("connections_limited", limit=limit, open_files=hard, advice="raise the hard limit of open files")
    return limit


def listen(host: str, port: int, flag: str) -> socket.socket:
    """A bound socket, opened before the model is loaded. Raises `OSError` if the port, which `flag` sets, is taken."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # else a client that stops reading would hold its image in memory for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD * 1000)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with {flag}") from error
    return listener
