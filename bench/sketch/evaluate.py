"""Measures what `flux/sketch` draws from the files that are served, for the tables of its model card.

    python -m bench.sketch.evaluate [--rows things,steps] [--images 100] [--recipe DIR] [--sheet FILE.png] [--card]

The engine draws every picture and `bench.sketch.recipe.reader` reads it without knowing the prompt. Prompts and seeds
are fixed. Figures are shares of the pictures; `right` means everything that
the prompt asks for. The reader's ceiling is its result on the training generator's own pictures after the VAE
(`--recipe DIR` fetches the icons with npm); its floor is its result against the prompt of another picture that asks
for something else.
`--card` writes the tables into the model card.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from bench.quality import psnr, ssim
from bench.sketch import card
from bench.sketch.prompts import (
    KNOWS,
    SEED,
    PromptCase,
    has_things,
    is_right,
    list_tables,
    make_cases,
    next_other,
    one_of_each,
    read_free_prompts,
)
from bench.sketch.recipe.concepts import CONCEPTS
from bench.sketch.recipe.data import Scene, Thing, make_scene, render
from bench.sketch.recipe.reader import Reader
from pipelines.engine.base import EngineConfig
from pipelines.engine.flux import FluxEngine
from pipelines.loading.build import load_one
from pipelines.request import GenerationParams

TILE = 128  # pixels of a picture on the sheet


@dataclass
class Score:
    """For each picture, whether the reading is right, and the seconds to draw it."""

    right: list[bool] = field(default_factory=list)
    thing: list[bool] = field(default_factory=list)
    ground: list[bool] = field(default_factory=list)
    floor: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        parts = {name: getattr(self, name) for name in ("right", "thing", "ground", "floor", "seconds")}
        return {"pictures": len(self.right)} | {name: mean(part) for name, part in parts.items() if part}


def draw(engine: FluxEngine, case: PromptCase) -> tuple[np.ndarray, float]:
    """8-bit RGB `(height, width, 3)`, and the seconds it took."""
    body = {
        "prompt": case.scene.caption,
        "image_size": "square",
        "seed": case.seed,
        "acceleration": "none",
    } | case.fields
    request = GenerationParams.model_validate(body).to_request("bench")
    start = time.perf_counter()
    sample = engine.prepare(request)[0]
    while engine.steps_left(sample):
        engine.step([sample])
    data = engine.finish(sample).data
    took = time.perf_counter() - start
    return np.frombuffer(data, np.uint8).reshape(request.height, request.width, 3), took


def score_cases(engine: FluxEngine, reader: Reader, cases: list[PromptCase]) -> tuple[Score, list[np.ndarray]]:
    """The score of all cases, and their pictures."""
    drawn = [draw(engine, case) for case in cases]
    pictures = [picture for picture, _ in drawn]
    readings, total = [reader.read(picture) for picture in pictures], Score(seconds=[took for _, took in drawn])
    for number, (case, reading) in enumerate(zip(cases, readings, strict=True)):
        total.right.append(is_right(case, reading))
        if case.noun is None:
            total.thing.append(has_things(case.scene, reading))
        if case.scene.named:
            total.ground.append(reading.background == case.scene.background)
        total.floor.append(is_right(case, readings[next_other(cases, number)]))
    return total, pictures


def measure_ceiling(recipe: Path, engine: FluxEngine, reader: Reader, count: int) -> dict[str, Any]:
    """The reader on the generator's own held-out pictures after the VAE, and the VAE's PSNR on them.

    The second row is the PSNR of drawn pictures against the training picture of the same thing and background.
    """
    from bench.sketch.recipe.atlas import Atlas, fetch

    atlas, vae = Atlas(fetch(recipe)), engine.pipeline.vae
    rng, right, signal = np.random.default_rng(SEED + 1), [], []
    for _ in range(count):
        scene = make_scene(rng, train=False)
        picture = torch.from_numpy(render(scene, atlas)).permute(2, 0, 1)[None] * 2 - 1
        with torch.inference_mode():
            again = vae.decode(vae.encode(picture).latent_dist.mode()).sample
        levels = [eight_bit(image[0].permute(1, 2, 0)) for image in (again, picture)]
        right.append(is_right(PromptCase(scene, SEED), reader.read(levels[0].numpy())))
        signal.append(psnr(*levels))
    near = []
    for case in make_cases(one_of_each(lambda concept: concept.name)[:count]):
        training = eight_bit(torch.from_numpy(render(case.scene, atlas)) * 2 - 1)
        near.append(psnr(torch.from_numpy(draw(engine, case)[0].copy()), training))
    return {
        "held-out scenes": {"reader_right": mean(right), "vae_psnr": mean(signal), "vae_psnr_worst": min(signal)},
        "nearest training picture": {"psnr": mean(near), "psnr_farthest": min(near), "psnr_nearest": max(near)},
    }


def eight_bit(image: torch.Tensor) -> torch.Tensor:
    """Levels 0 to 255 of an image in -1..1."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def measure_drift(pictures: Mapping[str, list[np.ndarray]]) -> dict[str, Any]:
    """Each preset's distance from `none`, and that of two seeds from each other."""
    exact = [torch.from_numpy(picture.copy()) for picture in pictures["none"]]
    rows = {}
    for preset, drawn in pictures.items():
        pairs = [(torch.from_numpy(a.copy()), b) for a, b in zip(drawn, exact, strict=True)]
        if preset != "none":
            rows[preset] = {"psnr": mean(psnr(*p) for p in pairs), "ssim": mean(ssim(*p) for p in pairs)}
    return rows


def measure_diversity(engine: FluxEngine, reader: Reader) -> dict[str, float]:
    """Eight seeds of one prompt: whether they show the same thing, and how far they are from each other."""
    scene = Scene(8, 8, (Thing(CONCEPTS[0], None, "alone"),), "white", "an apple", "one", named=False)
    pictures = [draw(engine, PromptCase(scene, SEED + number))[0] for number in range(8)]
    tensors = [torch.from_numpy(picture.copy()) for picture in pictures]
    distances = [psnr(a, b) for i, a in enumerate(tensors) for b in tensors[:i]]
    return {
        "same_thing": mean("apple" in reader.read(picture).things for picture in pictures),
        "psnr_between_seeds": mean(distances),
    }


def draw_sheet(engine: FluxEngine, steps: int) -> Image.Image:
    """A contact sheet: every thing once, then half of the free prompts."""
    cases = make_cases(one_of_each(lambda concept: concept.name)) + read_free_prompts()[::2]
    cases = [replace(case, fields={"num_inference_steps": steps}) for case in cases]
    columns = 10
    page = Image.new("RGB", (columns * (TILE + 4), -(-len(cases) // columns) * (TILE + 18)), "white")
    for number, case in enumerate(cases):
        left, top = number % columns * (TILE + 4), number // columns * (TILE + 18)
        page.paste(Image.fromarray(draw(engine, case)[0]).resize((TILE, TILE)), (left, top))
        words = case.scene.caption.removeprefix("a ").removesuffix(" on a white background")
        ImageDraw.Draw(page).text((left + 2, top + TILE + 2), words[:22], fill="black")
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sketch.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", default="things,kinds,free,sizes,steps,guidance,presets", help="tables, or none")
    parser.add_argument("--images", type=int, default=100, help="pictures a row")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps, but where steps are compared")
    parser.add_argument("--model", default="flux/sketch")
    parser.add_argument("--recipe", type=Path, help="folder for the icon package; gives the reader's ceiling")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--card", action="store_true", help="write the tables into the model card")
    options = parser.parse_args(arguments)
    engine = load_one(EngineConfig(options.model, device="cpu"), lambda _stage, _progress: None)
    reader, console = Reader(), Console()
    results: dict[str, dict[str, Any]] = {}
    presets: dict[str, list[np.ndarray]] = {}
    for table, row, cases in list_tables(options.images, options.steps):
        if table not in options.rows.split(","):
            continue
        found, pictures = score_cases(engine, reader, cases)
        results.setdefault(table, {})[row] = found.row()
        if table == "presets":
            presets[row] = pictures
        console.print(f"{table}: {row}: {results[table][row]}")
    if presets:
        results["drift"] = measure_drift(presets)
    if options.recipe:
        results["ceiling"] = measure_ceiling(options.recipe, engine, reader, options.images)
    results["seeds"] = {"eight seeds of 'an apple'": measure_diversity(engine, reader)}
    for name, rows in results.items():
        columns = list(dict.fromkeys(column for values in rows.values() for column in values))
        shown = Table(name, *columns)
        for row, values in rows.items():
            shown.add_row(row, *(f"{values[column]:.3g}" if column in values else "" for column in columns))
        console.print(shown)
    if options.sheet:
        draw_sheet(engine, options.steps).save(options.sheet)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.card:
        card.write(results, KNOWS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
