"""`srpo generate`: the same engine without HTTP. Draws prompts or a JSONL of requests into a file or a folder."""

import asyncio
import json
import os
import sys
from dataclasses import asdict

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipelines.errors import PipelineError, SafetyUnavailable
from pipelines.job import Job, Preview, PreviewPlan
from pipelines.request import ImageResult
from pipelines.safety.guard import InspectedResult
from pipelines.workers.pool import WorkerPool
from server.cli.banner import stand_in
from server.cli.batch import BatchItem, GenerateSettings, Refused, plan, with_parameters
from server.cli.parsing import format_error, parse
from server.cli.terminal import Renderer, choose_renderer
from server.images.source import Sources, UnusableImage
from server.jobs.generation import BLURRED, SHARP
from server.state import build_engine_config, build_guard, build_prompt_guard, build_signer
from weights.checkpoints import CHECKPOINTS

PREVIEWS = 3  # of each image, where they are wanted


def main(arguments: list[str]) -> int:
    settings = parse(with_parameters(), "generate", arguments)
    try:
        work = plan(settings)
        if not work:
            print("srpo generate: everything is drawn already", file=sys.stderr)
            return 0
        return asyncio.run(draw_all(work, settings))
    except (Refused, OSError, ValueError) as error:
        print(f"srpo generate: {format_error(error)}", file=sys.stderr)
        return 2
    except SafetyUnavailable as error:
        print(f"srpo generate: the safety checker: {error.cause}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("srpo generate: stopped; the same command goes on from here", file=sys.stderr)
        return 130


async def draw_all(work: list[BatchItem], settings: GenerateSettings) -> int:
    """Draw the tasks in order, with a bar for all and one for the current image."""
    signer = build_signer(settings)
    engine, guard, prompts = build_engine_config(settings), build_guard(settings), build_prompt_guard(settings)
    if CHECKPOINTS[engine.model].embedded:
        print(f"srpo generate: {stand_in(settings, engine.model)}", file=sys.stderr)
    pool = WorkerPool(engine, queue_size=1, request_timeout=float("inf"), step_timeout=settings.step_timeout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    render = choose_renderer(os.environ) if settings.preview else None
    if settings.preview and render is None:
        raise Refused("this terminal is not known to show images or 24-bit colour; leave --preview out")
    sources = Sources(may_fetch=True)
    failures = 0
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, transient=True) as progress:
        overall = progress.add_task("images", total=sum(len(item.files) for item in work))
        steps = progress.add_task("loading the model", total=None)
        await pool.start()
        try:
            while pool.status().state == "loading":
                progress.update(steps, description=pool.status().stage)
                await asyncio.sleep(0.05)
            if pool.failed.is_set():
                raise Refused(f"the model cannot be loaded: {pool.status().failure}")
            for item in work:
                try:
                    await asyncio.to_thread(prompts.check, item.params.prompt)
                    sharp = not guard.withholds(item.params.enable_safety_checker)
                    plan = PreviewPlan(PREVIEWS, SHARP if sharp else BLURRED) if render else PreviewPlan()
                    job = pool.submit(await item.request(engine.model, sources), plan)
                    result = await watch(job, progress, steps, overall, render)
                    inspected = await asyncio.to_thread(guard.inspect, result, item.params.enable_safety_checker)
                    await asyncio.to_thread(item.save, inspected, settings, signer)
                    if any(inspected.flagged):
                        progress.console.print(f"flagged by the safety checker: {item.files[0]}", soft_wrap=True)
                    if render:
                        size = (result.request.width, result.request.height)
                        for pixels in inspected.result.pixels:
                            display(render, progress, pixels, *size)
                    print(report(item, inspected) if settings.as_json else summary(item), flush=True)
                except (PipelineError, UnusableImage) as error:
                    failures += 1
                    if settings.as_json:
                        print(json.dumps({"files": [], "seed": item.params.seed, "error": str(error)}), flush=True)
                    progress.console.print(f"[red]not drawn:[/] {item.files[0]}: {error}", soft_wrap=True)
        finally:
            await pool.stop()
    return 1 if failures else 0


def summary(item: BatchItem) -> str:
    return f"{' '.join(map(str, item.files))} (seed {item.params.seed})"


def report(item: BatchItem, inspected: InspectedResult) -> str:
    """What became of a request, as one line of JSON."""
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


def display(render: Renderer, progress: Progress, pixels: bytes, width: int, height: int) -> None:
    """Put a picture above the bars."""
    picture = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    picture.thumbnail((SHARP, SHARP))
    progress.stop()
    progress.console.file.write(render(picture) + "\n")
    progress.start()


async def watch(
    job: Job, progress: Progress, steps: TaskID, overall: TaskID, render: Renderer | None = None
) -> ImageResult:
    """Follow a job on the bars until it is done."""
    total = job.request.steps
    async for step in job.events():
        if isinstance(step, Preview):
            if render:
                display(render, progress, step.pixels, step.width, step.height)
            continue
        stage = {"denoise": "steps", "text": "reading the prompt"}.get(step.stage, step.stage)
        progress.update(steps, description=f"image {step.image + 1}, {stage}", total=total, completed=step.step)
        if step.stage == "decode":
            progress.advance(overall)
    return await job.result()
