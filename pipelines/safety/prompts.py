"""Refuses the prompts that the operator does not allow, before any work on the device.

A list is a text file with one word or phrase on a line, or a regular expression between slashes; `#` begins a comment.
Words match whole words. The prompt is compared after Unicode's NFKC, case folding and the removal of invisible
characters, so that neither fullwidth letters nor zero-width spaces hide a word; an expression has to be written for
such a text. Such a list is easy to evade and blocks
too much, so it must not be the only protection. Refusals are counted; prompts are never stored.
"""

import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import regex

from pipelines.errors import PromptRefused, SafetyUnavailable
from pipelines.safety.moderation import PromptHook

REGEX_SECONDS = 1.0  # a runaway expression must not hold a request longer
SELECTORS = (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))  # of variants of a letter
INVISIBLE = {*"\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0", *map(chr, SELECTORS)}  # not all are Cf


class Rule(NamedTuple):
    """A line of the list, by its number: a rule's own words can be as private as a prompt."""

    line: int
    pattern: regex.Pattern[str]


def normalize_text(text: str) -> str:
    """The text as a reader sees it: NFKC, case-folded, without invisible characters, single spaces."""
    return " ".join(fold(text).split())


def fold(text: str) -> str:
    """NFKC, case-folded, without invisible characters."""
    shown = "".join(
        letter
        for letter in unicodedata.normalize("NFKC", text)
        if letter.isspace() or (unicodedata.category(letter) not in ("Cf", "Cc") and letter not in INVISIBLE)
    )
    return unicodedata.normalize("NFKC", shown.casefold())


def read_rules(file: Path) -> tuple[Rule, ...]:
    """The rules of a list. Raises `OSError`, or `ValueError` with the line that is wrong."""
    rules = []
    for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        is_regex = len(entry) > 1 and entry.startswith("/") and entry.endswith("/")
        words = normalize_text(entry)
        source = entry[1:-1] if is_regex else rf"(?<!\w){regex.escape(words)}(?!\w)"
        if is_regex and not regex.fullmatch(regex.escape(source), fold(source), regex.IGNORECASE):
            raise ValueError(
                f"{file}, line {number}: it has letters that are in no prompt: prompts are compared case-folded and in "
                "NFKC; write it so (ss for ß)"
            )
        try:
            pattern = regex.compile(source, regex.IGNORECASE)
        except regex.error as error:
            raise ValueError(f"{file}, line {number}: not a regular expression: {error}") from error
        if not words or pattern.search(""):
            raise ValueError(f"{file}, line {number}: it would refuse every prompt")
        rules.append(Rule(number, pattern))
    return tuple(rules)


class PromptGuard:
    """The operator's rules for prompts. `hook` asks the operator's own moderation service; True means refuse."""

    def __init__(self, rules: tuple[Rule, ...] = (), hook: Callable[[str], bool] | None = None) -> None:
        self._rules = rules
        self._hook = hook
        self._lock = threading.Lock()  # checks run in threads
        self._refused = 0

    @property
    def description(self) -> dict[str, Any]:
        """For `/health`."""
        return {"rules": len(self._rules), "hook": self._hook is not None, "refused": self._refused}

    @property
    def checks(self) -> bool:
        """Whether there is anything to check."""
        return bool(self._rules or self._hook)

    def check(self, prompt: str) -> None:
        """Raises `PromptRefused`, or `SafetyUnavailable` if the check fails. Blocks: call it in a thread."""
        if (reason := self._reason(prompt)) is not None:
            with self._lock:
                self._refused += 1
            raise PromptRefused(reason)

    def _reason(self, prompt: str) -> str | None:
        text = normalize_text(prompt) if self._rules else ""
        for rule in self._rules:
            try:
                hit = rule.pattern.search(text, timeout=REGEX_SECONDS, concurrent=True)
            except TimeoutError:
                raise SafetyUnavailable(f"line {rule.line} of the prompt list took too long") from None
            if hit:
                return f"line {rule.line} of the prompt list"
        if self._hook is not None and self._hook(prompt):
            return "the prompt hook"
        return None


def make_prompt_guard(prompt_list: Path | None = None, hook: str | None = None, seconds: float = 10.0) -> PromptGuard:
    """The guard for these settings. `hook` is a URL, which may take `seconds`. Raises `OSError` or `ValueError`."""
    return PromptGuard(read_rules(prompt_list) if prompt_list else (), PromptHook(hook, seconds) if hook else None)
