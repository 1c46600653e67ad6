"""The same bytes after the compile cache was lost, in two processes, and in company."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu.setup import REHEARSED, Results, Setup
from pipelines.fields import Size
from pipelines.optimize.batching import find_exact_batches

LAST_LINES = 30  # of what a process says before it fails


def start_twice(setup: Setup) -> Results:
    """`tiny` with all defaults starts, loses its compile cache, and starts again on the same `engine.json`."""
    with tempfile.TemporaryDirectory() as folder:
        compiled, kept = Path(folder, "compiled"), Path(folder, "engine.json")
        config: dict[str, Any] = {"model": "tiny", "device": str(setup.device), "tuning_cache": str(kept)}
        names = REHEARSED if setup.rehearse else ("default",)
        config |= {"compile_cache": str(compiled), "optimizations": names}
        runs = []
        for start in ("first", "second"):
            begun = time.perf_counter()
            runs.append(draw_elsewhere("load", config))
            yield f"{start} start, s", time.perf_counter() - begun
            shutil.rmtree(compiled, ignore_errors=True)
        yield "optimizations", runs[0]["optimizations"]
        yield "the same fingerprint", runs[0]["fingerprint"] == runs[1]["fingerprint"]
        yield "the same bytes", runs[0]["digests"] == runs[1]["digests"]
        yield "digests", runs[0]["digests"]


def draw_twice(setup: Setup) -> Results:
    """The model with the default optimizations, in two processes with compile caches of their own.

    What is chosen by timing is chosen once, as the processes of a server do.
    """
    runs = []
    for name in ("one", "other"):
        folder = setup.folder / f"compiled-{name}"
        config = {"folder": str(folder), "rehearse": setup.rehearse, "kept": str(setup.folder / "choices")}
        runs.append(draw_elsewhere("draw", config))
        yield f"digests, {name} process", runs[-1]["digests"]
    yield "the same bytes", runs[0]["digests"] == runs[1]["digests"]
    yield "exact batches 512x512", find_exact_batches(setup.compare().engine, Size(512, 512))


def draw_elsewhere(how: str, config: dict[str, Any]) -> dict[str, Any]:
    """What another process draws. Raises `RuntimeError` where it fails: its last line, then the last ones."""
    command = [sys.executable, "-m", "bench.gpu.digest", how, json.dumps(config)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()[-LAST_LINES:]
        raise RuntimeError("\n".join(["".join(lines[-1:]) or f"it ended with {ended.returncode}", *lines]))
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result
