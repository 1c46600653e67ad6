"""What was found out about a device, its software and its weights: once, then kept in `engine.json` and reused.

A file of sections; in each, values by key (an engine's fingerprint is part of it). Several workers may share the file.
"""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "engine.json"
OPTIMIZATIONS = "levers"  # the section of those that failed


class TuningCache:
    """The file at `path`; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remember(self, section: str, key: str, find: Callable[[], Any]) -> Any:
        """The value that is kept under `key`; if there is none, what `find` finds is from now on. JSON values only."""
        values = self.section(section)
        if key in values:
            return values[key]
        found = find()
        with self._locked():
            cache = self._read()
            value = cache.setdefault(section, {}).setdefault(key, found)  # another worker may have been faster
            self._write(cache)
        return value

    def section(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = self._read().get(name, {})
        return values

    def forget(self, section: str) -> None:
        with self._locked():
            cache = self._read()
            cache.pop(section, None)
            self._write(cache)

    def _read(self) -> dict[str, Any]:
        """Raises `ValueError` if the file is not what this class has written."""
        try:
            cache = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{self.path} is not readable: {error}. Remove it; it is made anew") from error
        if not isinstance(cache, dict):
            raise ValueError(f"{self.path} does not hold what was found out about the engine. Remove it")
        return cache

    def _write(self, cache: dict[str, Any]) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(cache, indent=2, sort_keys=True) + "\n")
        new.replace(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
