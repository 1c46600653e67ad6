"""Logs: one line an event, to standard error, in the same format from the API process and from every worker.

Our own events and the libraries' go through one renderer, which escapes control characters. Nobody's prompt is
logged: tracebacks show no local variables, and a message that may quote a prompt is left out.
"""

import json
import logging
import re
import sys
import threading
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Literal

import structlog
from structlog.typing import Processor

LogFormat = Literal["console", "json"]
QUIET = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "httpx", "alembic")  # only their warnings
STEM = 4  # a word is recognised by its first letters; shorter words are ignored
ESCAPE = re.compile(r"\\[xuUN]")
log = structlog.get_logger("srpo")


def configure(log_format: LogFormat) -> None:
    """Send our events, the libraries' warnings and uncaught exceptions through one renderer."""
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered: list[Processor] = (
        # a plain traceback: the default one shows local variables, prompts and keys among them
        [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            )
        ]
        if log_format == "console"
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered]
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.captureWarnings(True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    sys.excepthook = log_uncaught
    threading.excepthook = log_uncaught_in_thread


def pass_on(line: str, **fields: object) -> None:
    """A line of JSON that another process logged, as it is; any other line of its output as an event of ours."""
    try:
        is_event = isinstance(json.loads(line), dict)
    except ValueError:
        is_event = False
    if is_event:
        print(line, file=sys.stderr, flush=True)
    elif line.strip():
        log.info("worker_output", line=line.strip(), **fields)


def log_uncaught(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, frames)
    else:
        log.critical("uncaught", exc_info=error)


def log_uncaught_in_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None:
        log.critical("uncaught", exc_info=failure.exc_value)


def format_error(error: BaseException, prompts: Iterable[str]) -> str:
    """The traceback of an error. Where a message may quote one of `prompts`, types and frames without messages.

    The prompt is not merely replaced: libraries quote prompts in lower case, in pieces or escaped.
    """
    errors = list(causes(error))
    if not any(may_quote(message_of(each), prompt) for each in errors for prompt in prompts):
        return "".join(traceback.format_exception(error))
    return "".join(
        f"Traceback (most recent call last):\n{''.join(traceback.format_tb(each.__traceback__))}"
        f"{type(each).__qualname__}: the message is left out, because it may quote a prompt\n"
        for each in reversed(errors)
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then all that it came from, as a traceback shows them."""
    current: BaseException | None = error
    while current is not None:
        yield current
        if isinstance(current, BaseExceptionGroup):
            for part in current.exceptions:
                yield from causes(part)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def message_of(error: BaseException) -> str:
    """The text of an error: its message and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def may_quote(message: str, prompt: str) -> bool:
    """Whether a message shares a word with a prompt, or has characters that libraries' own messages do not have."""
    if not message.isascii() or ESCAPE.search(message):
        return True
    return prompt.casefold() in message.casefold() or not stems(prompt).isdisjoint(stems(message))


def stems(text: str) -> set[str]:
    """The first letters of every word that has at least that many."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return {word[:STEM] for word in words if len(word) >= STEM}
