"""The server's logs: its setting in the terms of `pipelines.logs`, whose format the workers share."""

import io
import sys

import structlog
from rich.console import Console

from pipelines import logs
from pipelines.logs import LogFormat
from server.settings.server import Settings

LOG_WIDTH = 200  # characters a line of a table may have in the log
log = structlog.get_logger("srpo")


def configure(settings: Settings) -> None:
    logs.configure(log_format_of(settings))


def log_format_of(settings: Settings) -> LogFormat:
    """`auto` is console on a terminal, else JSON."""
    if settings.log_format == "auto":
        return "console" if sys.stderr.isatty() else "json"
    return settings.log_format


class LogFile(io.StringIO):
    """A text file whose every write is one event of the log."""

    def write(self, text: str) -> int:
        if message := text.strip():
            log.info(message)
        return len(text)


def make_console(settings: Settings) -> Console:
    """What the server shows to the person who starts it, on standard error; in the log where that must be JSON."""
    if log_format_of(settings) == "json":
        return Console(file=LogFile(), width=LOG_WIDTH, highlight=False)
    return Console(stderr=True, highlight=False)
