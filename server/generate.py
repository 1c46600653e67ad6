"""`srpo generate`: the same engine without HTTP. Draws prompts or a JSONL of requests into a file or a folder.

Every finished request is written to `requests.jsonl` beside the images, with the seed that was used; run again, the
command goes on where it stopped.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import AliasChoices, Field, ValidationError, create_model
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipelines.errors import PipelineError, SafetyUnavailable
from pipelines.job import Job, Preview, PreviewPlan
from pipelines.pool import WorkerPool
from pipelines.request import OUTPUT_FORMATS, GenerationParams, ImageResult
from pipelines.safety import InspectedResult
from server.cli import parse
from server.encoding import encode_one
from server.run import BLURRED, SHARP
from server.schema import issues_of
from server.settings import EngineSettings
from server.spellings import kind_of, translate
from server.terminal import Show, shower

SUFFIXES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
RECORD = "requests.jsonl"
PREVIEWS = 3  # of each image, where they are wanted
NOT_FLAGS = ("prompt", "sync_mode", "output_format")


class Refused(Exception):
    """A request or an argument that cannot be drawn; the message is for the person who typed it."""


class GenerateSettings(EngineSettings):
    """Draw images without a server."""

    prompts: CliPositionalArg[list[str]] = Field([], description="what to draw; several prompts make several images")
    output: Path = Field(
        Path(),
        validation_alias=AliasChoices("o", "output"),
        description="a file (its suffix chooses the format) or a folder",
    )
    jsonl: Path | None = Field(None, description="a file with one request a line, in the API's own fields")
    format: str | None = Field(None, description=f"format of images in a folder: {', '.join(OUTPUT_FORMATS)}")
    as_json: bool = Field(
        False, validation_alias=AliasChoices("json", "as_json"), description="print one JSON object for each request"
    )
    preview: bool = Field(False, description="show the images on their way, in a terminal that can (24-bit colour)")


def with_parameters() -> type[GenerateSettings]:
    """Every generation parameter as a flag; values are JSON or text and go through the same validation as the API's."""
    fields: dict[str, Any] = {
        name: (str | None, Field(None, description=f"{info.description} ({kind_of(name).expected})"))
        for name, info in GenerationParams.model_fields.items()
        if name not in NOT_FLAGS
    }
    return create_model("GenerateSettings", __base__=GenerateSettings, **fields)


def main(arguments: list[str]) -> int:
    settings = parse(with_parameters(), "generate", arguments)
    try:
        work = plan(settings)
        if not work:
            print("srpo generate: everything is drawn already", file=sys.stderr)
            return 0
        return asyncio.run(draw_all(work, settings))
    except (Refused, OSError, ValueError) as error:
        print(f"srpo generate: {error}", file=sys.stderr)
        return 2
    except SafetyUnavailable as error:
        print(f"srpo generate: the safety checker: {error.cause}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("srpo generate: stopped; the same command goes on from here", file=sys.stderr)
        return 130


class Task:
    """One request, and the files it becomes."""

    def __init__(self, params: GenerationParams, files: list[Path], record: Path | None, line: dict[str, Any]) -> None:
        self.params = params
        self.files = files
        self.record = record
        self.line = line

    def save(self, inspected: InspectedResult, settings: EngineSettings) -> None:
        """Write the images atomically, then the line that says they are done."""
        for index, file in enumerate(self.files):
            image = encode_one(inspected, index, self.params.output_format, settings)
            temporary = file.with_name(file.name + ".partial")
            temporary.write_bytes(image.data)
            temporary.rename(file)
        if self.record is not None:
            done = {"request": self.line, "seed": self.params.seed, "files": [file.name for file in self.files]}
            with self.record.open("a") as record:
                record.write(json.dumps(done) + "\n")


def plan(settings: GenerateSettings) -> list[Task]:
    """The requests that are still to be drawn. Raises `Refused`."""
    lines = requested(settings)
    if not lines:
        raise Refused("nothing to draw: give a prompt or --jsonl FILE (see srpo generate --help)")
    one_file = settings.output.suffix.lower() in SUFFIXES
    if one_file and len(lines) > 1:
        raise Refused(f"{len(lines)} requests do not fit one file; give a folder as --output")
    folder = settings.output.parent if one_file else settings.output
    folder.mkdir(parents=True, exist_ok=True)
    record = None if one_file else folder / RECORD
    done = drawn(record)
    return [
        task(number, line, settings.output if one_file else None, folder, record)
        for number, line in enumerate(lines, 1)
        if (number, json.dumps(line, sort_keys=True)) not in done
    ]


def requested(settings: GenerateSettings) -> list[dict[str, Any]]:
    """Every request in the API's own fields: the flags are the defaults of each."""
    given = {name: getattr(settings, name) for name in GenerationParams.model_fields if name not in NOT_FLAGS}
    shared = {name: from_text(value) for name, value in given.items() if value is not None}
    if settings.output.suffix.lower() in SUFFIXES:
        shared["output_format"] = SUFFIXES[settings.output.suffix.lower()]
    elif settings.format is not None:
        shared["output_format"] = settings.format
    lines = [{"prompt": prompt} for prompt in settings.prompts]
    if settings.jsonl is not None:
        lines += read_jsonl(settings.jsonl)
    return [translate(shared | line).native for line in lines]


def from_text(text: str) -> Any:
    """A flag's value: JSON where it is JSON (28, true), `WxH` as a size, else the text itself."""
    width, x, height = text.partition("x")
    if x and width.isdigit() and height.isdigit():
        return {"width": int(width), "height": int(height)}
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    try:
        texts = file.read_text().splitlines()
        lines = [json.loads(text) for text in texts if text.strip()]
    except (OSError, ValueError) as error:
        raise Refused(f"{file}: {error}") from error
    if not all(isinstance(line, dict) for line in lines):
        raise Refused(f"{file}: every line must be a JSON object")
    return lines


def drawn(record: Path | None) -> set[tuple[int, str]]:
    """Number and request of everything the record says is done, and whose files are still there."""
    if record is None or not record.exists():
        return set()
    done = set()
    for text in record.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the last line of an interrupted run
        if all((record.parent / name).exists() for name in line["files"]):
            number = int(line["files"][0].split("-")[0].split(".")[0])
            done.add((number, json.dumps(line["request"], sort_keys=True)))
    return done


def task(number: int, line: dict[str, Any], file: Path | None, folder: Path, record: Path | None) -> Task:
    try:
        params = GenerationParams.model_validate(line)
    except ValidationError as error:
        issues = [issue for detail in error.errors(include_url=False) for issue in issues_of(detail)]
        listed = "; ".join(f"{'.'.join(map(str, issue['path']))}: {issue['message']}" for issue in issues)
        raise Refused(f"request {number}: {listed}") from error
    stem, suffix = (file.stem, file.suffix) if file else (f"{number:04d}", f".{params.output_format}")
    count = params.num_images
    names = [f"{stem}{suffix}"] if count == 1 else [f"{stem}-{index}{suffix}" for index in range(1, count + 1)]
    return Task(params, [folder / name for name in names], record, line)


async def draw_all(work: list[Task], settings: GenerateSettings) -> int:
    """Draw the tasks in order, with a bar for all and one for the current image."""
    settings.signer()
    engine, guard, prompts = settings.engine(), settings.guard(), settings.prompt_guard()
    pool = WorkerPool(engine, queue_size=1, request_timeout=float("inf"), step_timeout=settings.step_timeout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    show = shower(os.environ) if settings.preview else None
    if settings.preview and show is None:
        raise Refused("this terminal is not known to show images or 24-bit colour; leave --preview out")
    failures = 0
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True) as progress:
        overall = progress.add_task("images", total=sum(len(task.files) for task in work))
        steps = progress.add_task("loading the model", total=None)
        await pool.start()
        try:
            while pool.status().state == "loading":
                progress.update(steps, description=pool.status().stage)
                await asyncio.sleep(0.05)
            if pool.failed.is_set():
                raise Refused(f"the model cannot be loaded: {pool.status().failure}")
            for task in work:
                try:
                    await asyncio.to_thread(prompts.check, task.params.prompt)
                    sharp = not guard.withholds(task.params.enable_safety_checker)
                    plan = PreviewPlan(PREVIEWS, SHARP if sharp else BLURRED) if show else PreviewPlan()
                    job = pool.submit(task.params.to_request(engine.model), plan)
                    result = await watch(job, progress, steps, overall, show)
                    inspected = await asyncio.to_thread(guard.inspect, result, task.params.enable_safety_checker)
                    await asyncio.to_thread(task.save, inspected, settings)
                    if any(inspected.flagged):
                        progress.console.print(f"flagged by the safety checker: {task.files[0]}", soft_wrap=True)
                    if show:
                        size = (result.request.width, result.request.height)
                        for pixels in inspected.result.pixels:
                            display(show, progress, pixels, *size)
                    print(report(task, inspected) if settings.as_json else summary(task), flush=True)
                except PipelineError as error:
                    failures += 1
                    if settings.as_json:
                        print(json.dumps({"files": [], "seed": task.params.seed, "error": str(error)}), flush=True)
                    progress.console.print(f"[red]not drawn:[/] {task.files[0]}: {error}", soft_wrap=True)
        finally:
            await pool.stop()
    return 1 if failures else 0


def summary(task: Task) -> str:
    return f"{' '.join(map(str, task.files))} (seed {task.params.seed})"


def report(task: Task, inspected: InspectedResult) -> str:
    """What became of a request, as one line of JSON."""
    request = inspected.result.request
    return json.dumps(
        {
            "files": [str(file) for file in task.files],
            "seed": task.params.seed,
            "width": request.width,
            "height": request.height,
            "has_nsfw_concepts": list(inspected.flagged),
            "timings": asdict(inspected.result.timings),
            "notes": list(inspected.result.notes),
        }
    )


def display(show: Show, progress: Progress, pixels: bytes, width: int, height: int) -> None:
    """Put a picture above the bars."""
    picture = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    picture.thumbnail((SHARP, SHARP))
    progress.stop()
    progress.console.file.write(show(picture) + "\n")
    progress.start()


async def watch(job: Job, progress: Progress, steps: TaskID, overall: TaskID, show: Show | None = None) -> ImageResult:
    """Follow a job on the bars until it is done."""
    total = job.request.num_inference_steps
    async for step in job.events():
        if isinstance(step, Preview):
            if show:
                display(show, progress, step.pixels, step.width, step.height)
            continue
        stage = {"denoise": "steps", "text": "reading the prompt"}.get(step.stage, step.stage)
        progress.update(steps, description=f"image {step.image + 1}, {stage}", total=total, completed=step.step)
        if step.stage == "decode":
            progress.advance(overall)
    return await job.result()
