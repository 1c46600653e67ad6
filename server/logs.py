"""The server's logs: its setting in the terms of `pipelines.logs`, whose format the workers share."""

import sys

from pipelines import logs
from pipelines.logs import LogFormat
from server.settings import Settings


def configure(settings: Settings) -> None:
    logs.configure(log_format_of(settings))


def log_format_of(settings: Settings) -> LogFormat:
    """`auto` is console on a terminal, else JSON."""
    if settings.log_format == "auto":
        return "console" if sys.stderr.isatty() else "json"
    return settings.log_format
