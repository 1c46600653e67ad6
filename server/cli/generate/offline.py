"""`srpo generate --ray`: draws the lines of a file with many engines, into a bucket (see docs/cluster.md)."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.batch.bucket import BatchBucket
from server.batch.lines import CannotGenerate, Line, read_lines, to_native
from server.cli.generate.batch import BUCKET, GenerateSettings, read_shared
from server.cli.terminal.banner import describe_substitute
from server.cli.terminal.text import show_failure
from server.cluster.session import ADDRESS, TOKEN_FILE, secure_ray
from server.extras import missing_extra
from server.settings.engine import EngineSettings
from weights.checkpoints import CHECKPOINTS, choose_checkpoint

INSTALL = missing_extra("--ray", "ray")
COLUMNS = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def draw_file(settings: GenerateSettings, factory: str | None = None) -> int:
    """Draw the lines that are not drawn yet. Returns the exit code: 1 if one could not be drawn.

    Raises `CannotGenerate`. `factory` names another engine than the project's own.
    """
    file = settings.jsonl
    if file is None or settings.prompts or settings.image or settings.preview:
        raise CannotGenerate("--ray draws the lines of --jsonl FILE, without other prompts, --image and --preview")
    if not settings.target.startswith(BUCKET):
        raise CannotGenerate("--ray draws on several machines: give a bucket, --output s3://BUCKET/PREFIX")
    model = choose_checkpoint(settings.model, settings.models_dir).id
    if CHECKPOINTS[model].embedded:
        print(f"srpo generate: {describe_substitute(settings, model)}", file=sys.stderr)
    bucket = BatchBucket(settings.target, settings.store_endpoint, os.environ)
    total = count_lines(file)
    with tempfile.TemporaryDirectory() as folder, Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        if not os.environ.get(ADDRESS):  # Ray of this machine alone
            secure_ray(Path(folder, TOKEN_FILE))
        task = progress.add_task("loading the model", total=total)
        failures = Path(folder, "failures")
        with failures.open("w") as failed:
            for outcome in draw_lines(settings, file, factory):
                progress.update(task, description="requests", advance=1)
                if "error" in outcome:
                    failed.write(json.dumps(outcome) + "\n")
                    show_failure(progress.console, f"request {outcome['line']}", outcome["error"])
                elif "new" in outcome:
                    print(format_outcome(settings, outcome), flush=True)
        bucket.write_failures(failures)
        return int(failures.stat().st_size > 0)


def draw_lines(settings: GenerateSettings, file: Path, factory: str | None) -> Iterator[dict[str, Any]]:
    """What becomes of each line, in the order of their ends."""
    try:
        from server.cluster.offline import build_with, draw_batch, running_ray  # not before its environment is ready
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise CannotGenerate(INSTALL) from error
    engine = EngineSettings.model_construct(**{name: getattr(settings, name) for name in EngineSettings.model_fields})
    with running_ray(settings):
        build = build_with(settings, engine, settings.target, settings.store_endpoint, factory)
        yield from draw_batch(translate_lines(settings, file), settings.engines, build)


def translate_lines(settings: GenerateSettings, file: Path) -> Iterator[Line]:
    """The lines in the API's native fields, with what flags give to all of them."""
    shared = read_shared(settings)
    for line in read_lines(file):
        yield line if line.fault else Line(line.number, to_native(shared | line.fields))


def count_lines(file: Path) -> int:
    with file.open("rb") as opened:
        return sum(not line.isspace() for line in opened)


def format_outcome(settings: GenerateSettings, outcome: dict[str, Any]) -> str:
    if settings.as_json:
        return json.dumps({name: outcome[name] for name in ("line", "files", "seed")})
    return f"{' '.join(f'{settings.target}/{name}' for name in outcome['files'])} (seed {outcome['seed']})"
