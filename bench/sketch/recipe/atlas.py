"""The icons as RGBA pictures, in any size and, where a concept allows it, in any colour.

Icons come from the npm package `@iconify-json/fluent-emoji-flat` (Microsoft, MIT) and are rendered once.
"""

import functools
import io
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from bench.sketch.recipe.concepts import COLOURS, CONCEPTS, Concept

PACKAGE = "@iconify-json/fluent-emoji-flat"
RENDERED = 512  # pixels of a rendered icon's side
NEAR_HUE = 0.11  # of a full turn: what counts as the icon's main colour


def fetch(folder: Path) -> Path:
    """Install the icon package below `folder` with npm, once; returns its icons file."""
    icons = folder / "node_modules" / PACKAGE / "icons.json"
    if not icons.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", PACKAGE], cwd=folder, check=True)
    return icons


class Atlas:
    """The icons, rendered once; pictures of them in any size are kept."""

    def __init__(self, icons: Path) -> None:
        import resvg_py

        data = json.loads(icons.read_text())
        self._icons = {}
        for concept in CONCEPTS:
            icon = data["icons"].get(concept.icon) or data["icons"][data["aliases"][concept.icon]["parent"]]
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{icon["body"]}</svg>'
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDERED, height=RENDERED))
            self._icons[concept.name] = Image.open(io.BytesIO(png)).convert("RGBA")
        self._kept = functools.lru_cache(maxsize=1500)(self._picture)

    def picture(self, concept: Concept, colour: str | None, size: int) -> np.ndarray:
        """Premultiplied RGBA, float32 in 0..1, `(size, size, 4)`."""
        return self._kept(concept, colour, size).astype(np.float32) / 255

    def _picture(self, concept: Concept, colour: str | None, size: int) -> np.ndarray:
        icon = self._icons[concept.name]
        if colour is not None:
            icon = recolour(icon, colour)
        rgba = np.asarray(icon, dtype=np.float32) / 255
        premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
        method = Image.Resampling.BOX if size <= RENDERED // 2 else Image.Resampling.BICUBIC
        channels = [Image.fromarray(premultiplied[..., i]).resize((size, size), method) for i in range(4)]
        picture: np.ndarray = np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, 1)
        return (picture * 255).round().astype(np.uint8)


def recolour(icon: Image.Image, colour: str) -> Image.Image:
    """The icon with its main hue painted over; shading stays, other hues (a leaf, a wheel) stay."""
    rgba = np.asarray(icon, dtype=np.float32) / 255
    hsv = np.asarray(icon.convert("RGB").convert("HSV"), dtype=np.float32) / 255
    weight = hsv[..., 1] * rgba[..., 3] * hsv[..., 2]
    bins, edges = np.histogram(hsv[..., 0], bins=36, range=(0, 1), weights=weight)
    main = edges[int(bins.argmax())] + 1 / 72
    distance = np.abs((hsv[..., 0] - main + 0.5) % 1 - 0.5)
    mask = (distance < NEAR_HUE) & (hsv[..., 1] > 0.25)
    visible = rgba[..., 3] > 0.5
    if mask[visible].mean() < 0.25:
        mask = np.ones_like(mask)
    light = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    usual = float(np.median(light[mask & visible]))
    target = np.array(COLOURS[colour], dtype=np.float32) / 255
    shade = (light / max(usual, 0.05))[..., None]
    painted = np.where(shade <= 1, target * shade, target + (1 - target) * np.clip(shade - 1, 0, 1) * 0.7)
    rgba[..., :3] = np.where(mask[..., None], np.clip(painted, 0, 1), rgba[..., :3])
    return Image.fromarray((rgba * 255).astype(np.uint8), "RGBA")
