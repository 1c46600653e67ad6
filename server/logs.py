"""The server's logs: its setting in the terms of `pipelines.logs`, whose format the workers share."""

import io
import os
import sys
from collections.abc import Iterable
from itertools import pairwise

import structlog
from rich.console import Console
from rich.text import Text

from pipelines import logs
from pipelines.logs import LogFormat
from server.settings.server import Settings

LOG_WIDTH = 200  # characters a line of a table may have in the log
log = structlog.get_logger("srpo")


def configure(settings: Settings) -> None:
    logs.configure(log_format_of(settings))


def log_format_of(settings: Settings) -> LogFormat:
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


def make_console(settings: Settings) -> Console:
    """What the server shows to the person who starts it, on standard error; in the log where that must be JSON."""
    if log_format_of(settings) == "json":
        return Console(file=LogFile(), width=LOG_WIDTH, highlight=False)
    return Console(stderr=True, highlight=False)


def show_start_failure(console: Console, command: str, reason: str | Text) -> None:
    """Why the server does not start, to whom `console` speaks: a line of its own, or an error in the log."""
    if isinstance(console.file, LogFile):
        log.error("start_failed", reason=str(reason))
    else:
        console.print(Text.assemble(f"srpo {command}: ", reason), soft_wrap=True)


def log_wrong_settings(arguments: list[str], problems: Iterable[str]) -> bool:
    """Log each problem as why the server does not start. False where the log is no JSON: nothing is done then.

    Settings that cannot be read as a whole may still say what the log is. No logging is set up for it.
    """
    given = os.environ.get("SRPO_LOG_FORMAT", "auto")
    for argument, following in pairwise([*arguments, ""]):
        flag, equals, value = argument.replace("_", "-").partition("=")
        if flag == "--log-format":
            given = value if equals else following
    if given == "console" or (given != "json" and automatic_format() == "console"):
        return False
    logger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
    )
    for problem in problems:
        logger.error("start_failed", reason=problem)
    return True
