"""What previews cost a request: those of a stream, drawn from the latents and made into files, beside all the rest.

    srpo bench previews [--model tiny] [--size 1024x768] [--steps 28] [--images 5] [--json FILE]

Each image is drawn whole, with three previews where a stream has them. Their own seconds are divided by those of the
image without them. The preset is `high`: the shortest request, of which a preview is the largest part.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.engine.base import EngineConfig
from pipelines.engine.flux import FluxEngine
from pipelines.job import PreviewPlan
from pipelines.loading.build import load_one
from pipelines.request import GenerationParams, ImageRequest
from server.api.sse import PREVIEW_QUALITY
from server.images.encoding import encode
from server.jobs.generation import BLURRED, SHARP

PREVIEWS = 3
SIDES = {"blurred": BLURRED, "sharp": SHARP}


def draw(engine: FluxEngine, request: ImageRequest, side: int) -> tuple[float, float]:
    """Seconds of one image without its previews, and of these."""
    wanted, shown = PreviewPlan(PREVIEWS, side).steps(request.steps), 0.0
    start = time.perf_counter()
    sample = engine.prepare(request)[0]
    while engine.steps_left(sample):
        engine.step([sample])
        if request.steps - engine.steps_left(sample) in wanted:
            sample.latents.cpu()  # waits for the device: the step's seconds are not the preview's
            begun = time.perf_counter()
            if small := engine.preview(sample, side):
                encode(small.data, small.width, small.height, "jpeg", PREVIEW_QUALITY)
            shown += time.perf_counter() - begun
    engine.finish(sample)
    return time.perf_counter() - start - shown, shown


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "srpo bench previews", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--models-dir", default="models")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    engine = load_one(EngineConfig(options.model, options.models_dir, options.device), lambda *_: None)
    width, _, height = options.size.partition("x")
    body = {"prompt": "a red apple", "num_inference_steps": options.steps, "acceleration": "high", "seed": 7}
    size = {"width": int(width), "height": int(height)}
    request = GenerationParams.model_validate(body | {"image_size": size}).to_request(options.model)
    draw(engine, request, SHARP)  # warms up
    table = Table("previews", "ms each", "ms an image", "share", title=f"{options.model}, {options.size}")
    figures = {}
    for name, side in SIDES.items():
        images, previews = zip(*(draw(engine, request, side) for _ in range(options.images)), strict=True)
        whole, shown = 1000 * statistics.median(images), 1000 * statistics.median(previews)
        figures[name] = {"preview_ms": shown / PREVIEWS, "image_ms": whole, "share": shown / whole}
        table.add_row(name, f"{shown / PREVIEWS:.2f}", f"{whole:.0f}", f"{shown / whole:.2%}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
