"""What the previews of a stream add to a request: computing them from the latents, and encoding them.

    srpo bench previews [--model tiny] [--size 1024x768] [--steps 28] [--images 5] [--json FILE]

Each image is drawn with three previews, at the steps at which a stream sends them. The share is their seconds divided
by those of the image without them. The preset is `high`: its requests are the shortest, so the share is the largest.
"""

import statistics
import time

from bench.support.report import make_parser, print_table, write_json
from pipelines.engine.base import EngineConfig
from pipelines.engine.flux import FluxEngine
from pipelines.job import PreviewPlan
from pipelines.loading.build import load_one
from pipelines.request import GenerationParams, ImageRequest
from server.api.events import PREVIEW_QUALITY
from server.images.encoding import encode
from server.jobs.generation import BLURRED, SHARP

PREVIEWS = 3
SIDES = {"blurred": BLURRED, "sharp": SHARP}


def draw(engine: FluxEngine, request: ImageRequest, side: int) -> tuple[float, float]:
    """Seconds of one image without its previews, and of the previews."""
    steps, preview_seconds = PreviewPlan(PREVIEWS, side).steps(request.steps), 0.0
    start = time.perf_counter()
    sample = engine.prepare(request)[0]
    while engine.steps_left(sample):
        engine.step([sample])
        if request.steps - engine.steps_left(sample) in steps:
            sample.latents.cpu()  # waits for the device: so the step is not counted as the preview's
            preview_start = time.perf_counter()
            if small := engine.preview(sample, side):
                encode(small.data, small.width, small.height, "jpeg", PREVIEW_QUALITY)
            preview_seconds += time.perf_counter() - preview_start
    engine.finish(sample)
    return time.perf_counter() - start - preview_seconds, preview_seconds


def main(arguments: list[str]) -> int:
    parser = make_parser("previews", __doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--models-dir", default="models")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--images", type=int, default=5)
    options = parser.parse_args(arguments)
    engine = load_one(EngineConfig(options.model, options.models_dir, options.device), lambda *_: None)
    width, _, height = options.size.partition("x")
    body = {"prompt": "a red apple", "num_inference_steps": options.steps, "acceleration": "high", "seed": 7}
    size = {"width": int(width), "height": int(height)}
    request = GenerationParams.model_validate(body | {"image_size": size}).to_request(options.model)
    draw(engine, request, SHARP)  # warms up
    figures, rows = {}, []
    for name, side in SIDES.items():
        images, previews = zip(*(draw(engine, request, side) for _ in range(options.images)), strict=True)
        whole, shown = 1000 * statistics.median(images), 1000 * statistics.median(previews)
        figures[name] = {"preview_ms": shown / PREVIEWS, "image_ms": whole, "share": shown / whole}
        rows.append((name, f"{shown / PREVIEWS:.2f}", f"{whole:.0f}", f"{shown / whole:.2%}"))
    print_table(f"{options.model}, {options.size}", ("previews", "ms each", "ms an image", "share"), rows)
    write_json(figures, options.json)
    return 0
