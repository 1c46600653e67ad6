"""The server's logs: its setting in the terms of `pipelines.logs`, whose format the workers share."""

import io
import sys

import structlog
from rich.console import Console

from pipelines import logs
from pipelines.logs import LogFormat
from server.settings.metrics import LogSettings

LOG_WIDTH = 200  # characters a line of a table may have in the log
log = structlog.get_logger("srpo")


def configure(settings: LogSettings) -> None:
    logs.configure(log_format_of(settings))


def log_format_of(settings: LogSettings) -> LogFormat:
    """`auto` is console on a terminal, else JSON."""
    return settings.log_format if settings.log_format != "auto" else automatic_format()


def automatic_format() -> LogFormat:
    return "console" if sys.stderr.isatty() else "json"


class LogFile(io.StringIO):
    """A text file whose every write is one event of the log."""

    def write(self, text: str) -> int:
        if message := text.strip():
            log.info(message)
        return len(text)


def make_console(settings: LogSettings) -> Console:
    """What the server shows to the person who starts it, on standard error; in the log where that must be JSON."""
    if log_format_of(settings) == "json":
        return Console(file=LogFile(), width=LOG_WIDTH, highlight=False)
    return Console(stderr=True, highlight=False)
