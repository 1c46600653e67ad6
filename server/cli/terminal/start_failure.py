"""Why a server does not start, said where its log goes: to a person, or as an error of a log of JSON."""

import sys
from collections.abc import Iterable

import structlog
from rich.console import Console
from rich.text import Text

from server.cli.terminal.failure import CommandFailed
from server.cli.terminal.parsing import parse
from server.logs import LogFile, automatic_format, log_format_of
from server.settings.metrics import LogSettings

log = structlog.get_logger("srpo")


def show_start_failure(console: Console, command: str, reason: str | Text) -> None:
    """To whom `console` speaks: a line of its own, or an error in the log."""
    if isinstance(console.file, LogFile):
        log.error("start_failed", reason=str(reason))
    else:
        console.print(Text.assemble(f"srpo {command}: ", reason), soft_wrap=True)


def log_wrong_settings(command: str, arguments: list[str], problems: Iterable[str]) -> bool:
    """Log each problem of settings that could not be read. False where the log is no JSON: nothing is done then.

    What the log is may still be known. No logging is set up for it.
    """
    try:
        log_format = log_format_of(parse(LogSettings, command, arguments, ignore_others=True))
    except CommandFailed:
        log_format = automatic_format()
    if log_format == "console":
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
