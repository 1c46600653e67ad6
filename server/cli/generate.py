"""`srpo generate`: draws prompts or a JSONL file of requests with the server's engine, without HTTP."""

import asyncio
import json
import os
import sys
from dataclasses import asdict

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines import logs
from pipelines.errors import PipelineError, SafetyUnavailable
from pipelines.job import Job, Preview, PreviewPlan
from pipelines.request import ImageResult
from pipelines.safety.guard import InspectedResult
from pipelines.workers.pool import WorkerPool
from server.cli.banner import describe_substitute
from server.cli.batch import BatchItem, CannotGenerate, GenerateSettings, add_parameter_flags, plan_batch
from server.cli.parsing import format_error, parse
from server.cli.terminal import Renderer, choose_renderer
from server.images.decoding import UnusableImage
from server.images.source import Sources
from server.jobs.generation import BLURRED, SHARP
from server.state import build_engine_config, build_guard, build_patience, build_prompt_guard, build_signer
from server.threads import ThreadPools
from weights.checkpoints import CHECKPOINTS

PREVIEWS = 3  # of each image, with --preview


def main(arguments: list[str]) -> int:
    settings = parse(add_parameter_flags(), "generate", arguments)
    logs.configure("console")
    try:
        work = plan_batch(settings)
        if not work:
            print("srpo generate: everything is drawn already", file=sys.stderr)
            return 0
        return asyncio.run(draw_all(work, settings))
    except (CannotGenerate, OSError, ValueError) as error:
        print(f"srpo generate: {format_error(error)}", file=sys.stderr)
        return 2
    except SafetyUnavailable as error:
        print(f"srpo generate: the safety checker: {error.cause}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("srpo generate: stopped; the same command goes on from here", file=sys.stderr)
        return 130


async def draw_all(work: list[BatchItem], settings: GenerateSettings) -> int:
    """Draw the requests in order. Returns the exit code: 1 if one of them could not be drawn."""
    render = choose_renderer(os.environ) if settings.preview else None
    if settings.preview and render is None:
        raise CannotGenerate("this terminal is not known to show images or 24-bit colour; leave --preview out")
    engine = build_engine_config(settings)
    if CHECKPOINTS[engine.model].embedded:
        print(f"srpo generate: {describe_substitute(settings, engine.model)}", file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool = WorkerPool(engine, queue_size=1, request_timeout=float("inf"), patience=build_patience(settings))
    failures = 0
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True) as progress:
        display = Display(progress, render, images=sum(len(item.files) for item in work))
        runner = BatchRunner(settings, pool, engine.model, display)
        await pool.start()
        try:
            await display.follow_loading(pool)
            for item in work:
                try:
                    inspected = await runner.draw(item)
                    print(format_json(item, inspected) if settings.as_json else format_line(item), flush=True)
                except (PipelineError, UnusableImage) as error:
                    failures += 1
                    if settings.as_json:
                        print(json.dumps({"files": [], "seed": item.params.seed, "error": str(error)}), flush=True)
                    progress.console.print(f"[red]not drawn:[/] {item.files[0]}: {error}", soft_wrap=True)
        finally:
            await pool.stop()
    return 1 if failures else 0


class BatchRunner:
    """Draws one request after the other, with the checks and marks that the server applies."""

    def __init__(self, settings: GenerateSettings, pool: WorkerPool, model: str, display: "Display") -> None:
        self._settings = settings
        self._pool = pool
        self._model = model
        self._display = display
        self._signer = build_signer(settings)
        self._guard = build_guard(settings)
        self._prompts = build_prompt_guard(settings)
        self._sources = Sources(ThreadPools(), may_fetch=True)

    async def draw(self, item: BatchItem) -> InspectedResult:
        """Draw and save a request's images. Raises `PipelineError` or `UnusableImage`."""
        is_checked = item.params.enable_safety_checker
        await asyncio.to_thread(self._prompts.check, item.params.prompt)
        previews = PreviewPlan()
        if self._display.shows_pictures:
            previews = PreviewPlan(PREVIEWS, BLURRED if self._guard.withholds(is_checked) else SHARP)
        job = self._pool.submit(await item.request(self._model, self._sources), previews)
        result = await self._display.follow_job(job)
        inspected = await asyncio.to_thread(self._guard.inspect, result, is_checked)
        await asyncio.to_thread(item.save, inspected, self._settings, self._signer)
        self._display.show_result(inspected, item)
        return inspected


class Display:
    """What the terminal shows: a bar for all images, one for the current image, and pictures where it can."""

    def __init__(self, progress: Progress, render: Renderer | None, images: int) -> None:
        self._progress = progress
        self._render = render
        self._overall = progress.add_task("images", total=images)
        self._steps = progress.add_task("loading the model", total=None)

    @property
    def shows_pictures(self) -> bool:
        return self._render is not None

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

    def show_result(self, inspected: InspectedResult, item: BatchItem) -> None:
        """Show the finished images, and whether the safety checker flagged some."""
        if any(inspected.flagged):
            self._progress.console.print(f"flagged by the safety checker: {item.files[0]}", soft_wrap=True)
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


def format_line(item: BatchItem) -> str:
    return f"{' '.join(map(str, item.files))} (seed {item.params.seed})"


def format_json(item: BatchItem, inspected: InspectedResult) -> str:
    """The files and facts of a drawn request, as one line of JSON."""
    request = inspected.result.request
    return json.dumps(
        {
            "files": [str(file) for file in item.files],
            "seed": item.params.seed,
            "width": request.width,
            "height": request.height,
            "has_nsfw_concepts": list(inspected.flagged),
            "timings": asdict(inspected.result.timings),
            "notes": list(inspected.result.notes),
        }
    )
