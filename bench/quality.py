"""How much the presets change a model's pictures: the drift from `none` on the same seeds, and a contact sheet.

    srpo bench quality [--model flux/sketch|flux/srpo] [--images 8] [--steps 28,50] [--sheet FILE.png] [--json FILE]

PSNR in dB and SSIM (Wang et al. 2004: luma, Gaussian window of 11, sigma 1.5), mean and worst over the images, and the
seconds of denoising, with the speed-up over `none`. `other seed` is the distance between two different pictures: a
drift that comes near it means another picture.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from bench.support.report import make_parser, print_table, write_json
from pipelines.acceleration import PRESETS
from pipelines.engine.base import EngineConfig
from pipelines.engine.flux import FluxEngine
from pipelines.loading.build import load_one
from pipelines.request import GenerationParams

PROMPTS = (
    "a red apple on a wooden table",
    "a lighthouse in a storm at night",
    "portrait of an old fisherman, soft light",
    "a street market in the rain, neon signs",
    "a fox in fresh snow",
    "a glass of water beside a stack of books",
    "a blue bicycle against a yellow wall",
    "mountains at dawn, mist in the valley",
)
TILE = 256  # pixels of a picture's longer side on the sheet
LUMA = (0.299, 0.587, 0.114)


def psnr(picture: torch.Tensor, exact: torch.Tensor) -> float:
    """Of two `(height, width, 3)` 8-bit pictures, in dB; infinite for equal ones."""
    error = (picture.double() - exact.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def ssim(picture: torch.Tensor, exact: torch.Tensor) -> float:
    """Of two `(height, width, 3)` 8-bit pictures, from -1 to 1; 1 for equal ones."""
    taps = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64).square() / (2 * 1.5**2))
    window = (taps[:, None] * taps / taps.sum() ** 2)[None, None]

    def blur(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(values[None, None], window)

    a, b = (image.double() @ torch.tensor(LUMA, dtype=torch.float64) for image in (picture, exact))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(similarity.mean())


def draw(engine: FluxEngine, preset: str, number: int, size: tuple[int, int], steps: int) -> tuple[torch.Tensor, float]:
    """Picture `number`, and the seconds its steps took."""
    body = {
        "prompt": PROMPTS[number % len(PROMPTS)],
        "image_size": {"width": size[0], "height": size[1]},
        "num_inference_steps": steps,
        "acceleration": preset,
        "seed": number + 1,
    }
    sample = engine.prepare(GenerationParams.model_validate(body).to_request("bench"))[0]
    start = time.perf_counter()
    while engine.steps_left(sample):
        engine.step([sample])
    sample.latents.cpu()  # waits for the device
    took = time.perf_counter() - start
    data = bytearray(engine.finish(sample).data)
    return torch.frombuffer(data, dtype=torch.uint8).reshape(size[1], size[0], 3), took


def compare(pictures: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    pairs = list(zip(pictures, exact, strict=True))
    signal, likeness = [psnr(*pair) for pair in pairs], [ssim(*pair) for pair in pairs]
    return {
        "psnr_mean": statistics.mean(signal),
        "psnr_worst": min(signal),
        "ssim_mean": statistics.mean(likeness),
        "ssim_worst": min(likeness),
    }


def make_sheet(columns: dict[str, list[torch.Tensor]]) -> Image.Image:
    """A contact sheet: a column a preset, a row a picture."""
    height, width, _ = next(iter(columns.values()))[0].shape
    scale = TILE / max(width, height)
    tile = (round(width * scale), round(height * scale))
    rows = max(len(pictures) for pictures in columns.values())
    page = Image.new("RGB", (len(columns) * (tile[0] + 8), rows * (tile[1] + 8) + 20), "white")
    for column, (name, pictures) in enumerate(columns.items()):
        left = column * (tile[0] + 8) + 4
        ImageDraw.Draw(page).text((left, 4), name, fill="black")
        for row, picture in enumerate(pictures):
            page.paste(Image.fromarray(picture.numpy()).resize(tile), (left, 20 + row * (tile[1] + 8)))
    return page


def measure(engine: FluxEngine, images: int, size: tuple[int, int], steps: int) -> tuple[dict[str, Any], Image.Image]:
    """A row a preset, and the sheet."""
    drawn = {preset: [draw(engine, preset, number, size, steps) for number in range(images)] for preset in PRESETS}
    columns = {preset: [picture for picture, _ in results] for preset, results in drawn.items()}
    seconds = {preset: statistics.median(took for _, took in results) for preset, results in drawn.items()}
    exact = columns["none"]
    rows: dict[str, Any] = {
        preset: {
            "computed_steps": sum(mask(steps)),
            "denoise_s": seconds[preset],
            "denoise_speed_up": seconds["none"] / seconds[preset],
            **compare(columns[preset], exact),
        }
        for preset, mask in PRESETS.items()
        if preset != "none"
    }
    alone = {"computed_steps": steps, "denoise_s": seconds["none"], "denoise_speed_up": 1.0}
    rows["other seed"] = alone | compare([*exact[1:], exact[0]], exact)
    return rows, make_sheet(columns)


def main(arguments: list[str]) -> int:
    parser = make_parser("quality", __doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--models-dir", default="models")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--images", type=int, default=len(PROMPTS))
    parser.add_argument("--steps", default="28", help="one number or several: 4,8,12,28,40,50")
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args(arguments)
    width, _, height = options.size.partition("x")
    config = EngineConfig(options.model, options.models_dir, options.device, options.dtype)
    engine = load_one(config, lambda _stage, _progress: None)
    figures: dict[str, Any] = {}
    for steps in options.steps.split(","):
        rows, page = measure(engine, options.images, (int(width), int(height)), int(steps))
        figures[steps] = rows
        names = list(next(iter(rows.values())))
        cells = [(preset, *(f"{row[name]:.3g}" for name in names)) for preset, row in rows.items()]
        print_table(f"{options.model}, {options.size}, {steps} steps", ("against none", *names), cells)
    if options.sheet:  # of the last number of steps
        page.save(options.sheet)
    write_json(figures, options.json)
    return 0
