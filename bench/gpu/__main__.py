"""All that is to be measured on a GPU, most wanted first, in under half an hour.

    python -m bench.gpu [--folder bench-gpu] [--stages card,bf16] [--rehearse]

Each stage is a process of its own, so one that loses the device takes no other along. It writes its figures to
FOLDER/STAGE.json as soon as each is known. What has been measured is not measured again; what has failed is tried once
more by the next call. At the end comes a table with what was predicted beside what was measured. `--rehearse` runs the
real code of every stage on a CPU with `tiny`, small; what needs CUDA says so.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from rich.console import Console

from bench.gpu.predictions import PREDICTIONS
from bench.gpu.setup import Setup
from bench.gpu.stages import STAGES
from bench.support.report import print_table, write_json
from pipelines.workers.worker import configure_libraries

SLACK = 2.5  # a stage may take as many times its minutes


def run_stage(name: str, setup: Setup) -> bool:
    """Run one stage in this process and write its figures, each as soon as it is known. False if it fails."""
    file, start = setup.folder / f"{name}.json", time.perf_counter()
    result: dict[str, Any] = {"device": setup.label, "figures": {}, "state": "interrupted"}
    done = False
    try:
        for figure, value in resolve_name(STAGES[name].function)(setup):
            result["figures"][figure] = value
            result["seconds"] = time.perf_counter() - start
            print(f"  {figure}: {describe(value)}", flush=True)
            write_json(result, file)
        result["state"], done = "done", True
    except Exception as error:  # noqa: BLE001 - whatever fails is a finding, and the next stage runs
        result |= {"state": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    result["seconds"] = time.perf_counter() - start
    write_json(result, file)
    return done


def run_apart(name: str, options: argparse.Namespace) -> None:
    """Run one stage in a process of its own. Its death or a hang is recorded as its failure."""
    command = [sys.executable, "-m", "bench.gpu", "--here", "--stages", name, "--folder", str(options.folder)]
    command += ["--rehearse"] * options.rehearse
    env = dict(os.environ)
    configure_libraries(env)  # as for a worker: memory is measured with the allocator that serves
    limit = 60 * SLACK * STAGES[name].minutes
    try:
        error = f"the process ended with {run_group(command, env, limit)}"
    except subprocess.TimeoutExpired:
        error = f"took more than {limit:.0f} s"
    file = options.folder / f"{name}.json"
    if (result := read(file)).get("state") not in ("done", "failed"):
        write_json({"figures": {}, **result, "state": "failed", "error": error}, file)


def run_group(command: list[str], env: Mapping[str, str], limit: float) -> int:
    """The exit code of a process. What it has started ends with it, and gives the card back, also where it is killed.

    Raises `TimeoutExpired` after `limit` seconds.
    """
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        return process.wait(limit)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(file: Path) -> dict[str, Any]:
    """A stage's results so far."""
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return result


def list_missing(names: list[str], folder: Path) -> list[str]:
    """The stages to run: first those that have never run to an end, then those that have failed."""
    states = {name: read(folder / f"{name}.json").get("state") for name in names}
    return sorted((name for name in names if states[name] != "done"), key=lambda name: states[name] == "failed")


def describe(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(describe, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {describe(one)}" for name, one in value.items())
    return str(value)


def show(names: list[str], folder: Path) -> None:
    """The table of all figures, on the screen and in FOLDER/table.md."""
    rows = []
    for name in names:
        result, expected = read(folder / f"{name}.json"), PREDICTIONS.get(name, {})
        figures = {figure: describe(value) for figure, value in result.get("figures", {}).items()}
        figures |= {figure: "not measured" for figure in expected if figure not in figures}
        if "error" in result:
            figures["FAILED"] = result["error"].partition("\n")[0]
        rows += [(name, figure, expected.get(figure, ""), value) for figure, value in figures.items()]
    columns = ("stage", "figure", "predicted", "measured")
    print_table("predicted for an H100, and measured", columns, rows)
    lines = [columns, ("---",) * 4, *rows]
    (folder / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("bench-gpu"))
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, by name")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process, one after the other")
    options = parser.parse_args(arguments)
    names = [name for name in STAGES if name in options.stages.split(",")]
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.here:
        label = Setup(options.folder, options.rehearse).label
        if others := {read(file).get("device") for file in options.folder.glob("*.json")} - {label, None}:
            parser.error(f"{options.folder} holds figures of {', '.join(map(str, others))}: give another --folder")
    missing, start = list_missing(names, options.folder), time.perf_counter()
    for number, name in enumerate(missing):
        left = sum(STAGES[one].minutes for one in missing[number:])
        title = f"{number + 1} of {len(missing)}, about {left:g} min left: {name}: {STAGES[name].description}"
        Console().print(title, style="bold", highlight=False)
        if options.here:
            run_stage(name, Setup(options.folder, options.rehearse))
        else:
            run_apart(name, options)
    if not options.here or len(names) > 1:
        show(names, options.folder)
        print(f"{len(missing)} stages in {time.perf_counter() - start:.0f} s")
    return int(any(read(options.folder / f"{name}.json").get("state") != "done" for name in names))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
