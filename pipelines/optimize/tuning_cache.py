"""What was measured once on a device, with its software and weights, and is reused: the file `engine.json`.

The file has sections; each holds values by key, and an engine's fingerprint is part of the key. Several workers may
share the file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from weights.durable_file import write_durably

NAME = "engine.json"
FAILED_OPTIMIZATIONS = "failed_optimizations"  # a section's name


class TuningCache:
    """The file at `path`; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def remember(self, section: str, key: str, measure: Callable[[], Any]) -> Any:
        """The value under `key`; where there is none, what `measure` returns, stored for later. JSON values only."""
        values = self.section(section)
        if key in values:
            return values[key]
        measured = measure()
        with self._lock():
            cache = self._read()
            value = cache.setdefault(section, {}).setdefault(key, measured)  # another worker may have been faster
            self._write(cache)
        return value

    def section(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = self._read().get(name, {})
        return values

    def forget(self, section: str) -> None:
        with self._lock():
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
            raise ValueError(f"{self.path} is not a tuning cache. Remove it")
        return cache

    def _write(self, cache: dict[str, Any]) -> None:
        write_durably(self.path, (json.dumps(cache, indent=2, sort_keys=True) + "\n").encode())

    def _lock(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_suffix(".lock"))
