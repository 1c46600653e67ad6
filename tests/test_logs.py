"""What the log says of an error, and of whom it is silent."""

import json
import subprocess
import sys

import pytest

from pipelines.logs import format_error


def failure(message: str, note: str | None = None) -> Exception:
    """An error with a traceback, a note, and another error behind it."""
    try:
        try:
            raise ValueError(message)
        except ValueError as error:
            if note is not None:
                error.add_note(note)
            raise RuntimeError("the text encoder failed") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("A secret wish", "cannot encode: A secret wish"),
        ("A secret wish", "cannot encode: a secret wish"),
        ("A secret wish", "tokens ['a</w>', 'secret</w>']"),
        ("A secret wish", "truncated: 'secr"),
        ("A secret wish", "bad token \u0120secret"),
        ("caf\u00e9", "unknown token caf\\xe9"),
        ("\uff33\uff45\uff43\uff52\uff45\uff54", "unknown token secret"),
        ("a\tb", "unknown token a\tb"),
    ],
)
def test_a_message_that_quotes_a_prompt_in_any_form_is_left_out(prompt: str, message: str) -> None:
    for error in (failure(message), failure("no", note=message), ExceptionGroup("no", [failure(message)])):
        text = format_error(error, ["something else", prompt])
        assert message not in text
        assert type(error).__name__ in text
    assert f"in {failure.__name__}" in format_error(failure(message), [prompt])


def test_a_message_that_quotes_nobody_is_kept() -> None:
    message = "mat1 and mat2 shapes cannot be multiplied (77x768 and 512x64)"
    text = format_error(failure(message), ["A secret wish", "and a cat"])
    assert f"ValueError: {message}" in text
    assert "RuntimeError: the text encoder failed" in text


SPEAK = """
import logging, sys, threading, warnings
from pipelines import logs
logs.configure(sys.argv[1])
logging.getLogger("transformers").warning("a library's warning")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise RuntimeError("a bug")
"""


def test_libraries_warnings_and_uncaught_errors_are_json_too() -> None:
    ended = subprocess.run([sys.executable, "-c", SPEAK, "json"], capture_output=True, text=True)
    assert ended.returncode == 1
    entries = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [entry["level"] for entry in entries] == ["warning", "warning", "critical", "critical"]
    assert "ZeroDivisionError" in entries[2]["exception"]
    assert "RuntimeError: a bug" in entries[3]["exception"]
