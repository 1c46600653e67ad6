"""`srpo generate`: draws prompts or a JSONL file of requests with the server's engine, without HTTP."""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import logs
from pipelines.errors import PipelineError, SafetyUnavailable
from pipelines.job import Job, Preview, PreviewPlan
from pipelines.request import ImageResult
from pipelines.safety.guard import InspectedResult
from pipelines.workers.pool import WorkerPool
from pipelines.workers.supervisor import local_workers
from server.batch.drawing import Drawing
from server.batch.items import BatchItem
from server.batch.lines import CannotGenerate
from server.cli.generate.batch import GenerateSettings, Output, add_parameter_flags, plan_batch
from server.cli.generate.offline import draw_file
from server.cli.terminal.banner import describe_substitute
from server.cli.terminal.failure import STOPPED, CommandFailed, format_error
from server.cli.terminal.parsing import parse
from server.cli.terminal.text import Renderer, choose_renderer, show_failure
from server.engine_setup import build_engine_config, build_patience
from server.errors import StoreUnavailable
from server.images.decoding import UnusableImage
from server.jobs.generation import BLURRED, SHARP
from weights.checkpoints import CHECKPOINTS

PREVIEWS = 3  # of each image, with --preview


def main(arguments: list[str]) -> int:
    settings = parse(add_parameter_flags(), "generate", arguments)
    logs.configure("console")
    try:
        if settings.ray:
            return draw_file(settings)
        work, output = plan_batch(settings)
        if not work:
            print("srpo generate: everything is drawn already", file=sys.stderr)
            return 0
        return asyncio.run(draw_all(work, output, settings))
    except (CannotGenerate, StoreUnavailable, OSError, ValueError) as error:
        raise CommandFailed(format_error(error)) from error
    except SafetyUnavailable as error:
        raise CommandFailed(f"the safety checker: {error.cause}") from error
    except KeyboardInterrupt:
        raise CommandFailed("stopped; the same command goes on from here", exit_code=STOPPED) from None


async def draw_all(work: list[BatchItem], output: Output, settings: GenerateSettings) -> int:
    """Draw the requests in order. Returns the exit code: 1 if one of them could not be drawn."""
    render = choose_renderer(os.environ) if settings.preview else None
    if settings.preview and render is None:
        raise CannotGenerate("this terminal is not known to show images or 24-bit colour; leave --preview out")
    # Where there is a server's data folder, its choices and compiled kernels hold: the same bytes as the server's.
    engine = build_engine_config(settings, settings.data_dir if settings.data_dir.is_dir() else None)
    if CHECKPOINTS[engine.model].embedded:
        print(f"srpo generate: {describe_substitute(settings, engine.model)}", file=sys.stderr)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    workers = local_workers(engine, patience=build_patience(settings))
    pool = WorkerPool(workers, queue_size=1, request_timeout=float("inf"))
    failures = 0
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True) as progress:
        display = Display(progress, render, images=sum(len(item.names) for item in work))
        drawing = Drawing(settings, pool, engine.model)
        await pool.start()
        try:
            await display.follow_loading(pool)
            for item in work:
                files = output.files(item)
                try:
                    inspected = await display.draw(drawing, item)
                    await asyncio.to_thread(output.save, item, inspected, settings, drawing.signer)
                    display.show_result(inspected, files[0])
                    line = format_json(item, files, inspected) if settings.as_json else format_line(item, files)
                    print(line, flush=True)
                except (PipelineError, UnusableImage) as error:
                    if pool.failed.is_set():
                        raise CannotGenerate(f"nothing more can be drawn: {pool.status().failure}") from error
                    failures += 1
                    if settings.as_json:
                        print(json.dumps({"files": [], "seed": item.params.seed, "error": str(error)}), flush=True)
                    show_failure(progress.console, str(files[0]), str(error))
        finally:
            await pool.stop()
    return 1 if failures else 0


class Display:
    """What the terminal shows: a bar for all images, one for the current image, and pictures where it can."""

    def __init__(self, progress: Progress, render: Renderer | None, images: int) -> None:
        self._progress = progress
        self._render = render
        self._overall = progress.add_task("images", total=images)
        self._steps = progress.add_task("loading the model", total=None)

    async def draw(self, drawing: Drawing, item: BatchItem) -> InspectedResult:
        """Show a request being drawn. Raises what `Drawing` does."""
        previews = PreviewPlan()
        if self._render is not None:
            blurred = drawing.guard.withholds(item.params.enable_safety_checker)
            previews = PreviewPlan(PREVIEWS, BLURRED if blurred else SHARP)
        return await drawing.draw(item, previews, self.follow_job)

    async def follow_loading(self, pool: WorkerPool) -> None:
        """Show the stages until the model is loaded. Raises `CannotGenerate` if it cannot be."""
        while pool.status().state == "loading":
            self._progress.update(self._steps, description=pool.status().stage)
            await asyncio.sleep(0.05)
        if pool.failed.is_set():
            raise CannotGenerate(f"the model cannot be loaded: {pool.status().failure}")

    async def follow_job(self, job: Job) -> ImageResult:
        """Show a job's steps and previews until it is done."""
        async for step in job.events():
            if isinstance(step, Preview):
                self._show_picture(step.pixels, step.width, step.height)
                continue
            stage = {"denoise": "steps", "text": "reading the prompt"}.get(step.stage, step.stage)
            description = f"image {step.image + 1}, {stage}"
            self._progress.update(self._steps, description=description, total=job.request.steps, completed=step.step)
            if step.stage == "decode":
                self._progress.advance(self._overall)
        return await job.result()

    def show_result(self, inspected: InspectedResult, file: Path) -> None:
        """Show the finished images, and whether the safety checker flagged some."""
        if any(inspected.flagged):
            self._progress.console.print(f"flagged by the safety checker: {file}", markup=False, soft_wrap=True)
        request = inspected.result.request
        for pixels in inspected.result.pixels:
            self._show_picture(pixels, request.width, request.height)

    def _show_picture(self, pixels: bytes, width: int, height: int) -> None:
        """Print a picture above the bars, in a terminal that can show one."""
        if self._render is None:
            return
        picture = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
        picture.thumbnail((SHARP, SHARP))
        self._progress.stop()
        self._progress.console.file.write(self._render(picture) + "\n")
        self._progress.start()


def format_line(item: BatchItem, files: list[Path]) -> str:
    return f"{' '.join(map(str, files))} (seed {item.params.seed})"


def format_json(item: BatchItem, files: list[Path], inspected: InspectedResult) -> str:
    """The files and facts of a drawn request, as one line of JSON."""
    request = inspected.result.request
    return json.dumps(
        {
            "files": [str(file) for file in files],
            "seed": item.params.seed,
            "width": request.width,
            "height": request.height,
            "has_nsfw_concepts": list(inspected.flagged),
            "timings": asdict(inspected.result.timings),
            "notes": list(inspected.result.notes),
        }
    )
