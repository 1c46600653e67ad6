"""The scenes that things stand on, drawn flat. Their left and right edges are plain: wide pictures draw them out."""

import io

import numpy as np
from PIL import Image

SKY = "#9bd8f6"


def rect(top: float, bottom: float, colour: str) -> str:
    return f'<rect x="0" y="{top}" width="8" height="{bottom - top}" fill="{colour}"/>'


def shape(points: str, colour: str) -> str:
    return f'<polygon points="{points}" fill="{colour}"/>'


def dot(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>'


def stars(colour: str, lowest: float = 8.0) -> str:
    """Small discs, always the same."""
    rng = np.random.default_rng(3)
    places = [(0.4 + 7.2 * rng.random(), 0.3 + 7.4 * rng.random(), 0.05 + 0.05 * rng.random()) for _ in range(34)]
    return "".join(dot(round(x, 2), round(y, 2), round(r, 2), colour) for x, y, r in places if y < lowest - 0.2)


def bars(places: str, colour: str) -> str:
    """Short horizontal lines; each place is `x,y`."""
    return "".join(
        f'<rect x="{x}" y="{y}" width="1.2" height="0.12" fill="{colour}"/>'
        for x, y in (place.split(",") for place in places.split())
    )


def skyline() -> str:
    parts, rng = [], np.random.default_rng(5)
    for left, width, top, colour in (
        (0.5, 1.2, 3.0, "#7d8fa8"),
        (1.7, 1.0, 1.6, "#5f7391"),
        (2.9, 1.3, 3.6, "#8c9db5"),
        (4.3, 1.1, 1.0, "#6b7f9d"),
        (5.5, 1.0, 2.6, "#8395ae"),
        (6.6, 0.9, 3.4, "#5f7391"),
    ):
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{6.0 - top}" fill="{colour}"/>')
        for row in range(int((5.6 - top) / 0.6)):
            for column in range(2):
                lit = "#ffe08a" if rng.random() < 0.5 else "#c5d5e8"
                x, y = left + 0.2 + column * (width - 0.65), top + 0.3 + row * 0.6
                parts.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="0.25" height="0.3" fill="{lit}"/>')
    return "".join(parts)


PEAKS = (("0.4,6 2.4,2.4 4.4,6", "1.84,3.4 2.4,2.4 2.96,3.4"), ("3,6 5.4,1.4 7.7,6", "4.77,2.6 5.4,1.4 6,2.6"))
DRAWN = {
    "beach": rect(0, 3.5, SKY) + rect(3.5, 5, "#2f93d6") + rect(5, 8, "#f3d691"),
    "sea": rect(0, 3.5, SKY) + rect(3.5, 8, "#2f86cf") + bars("1,4.5 5,4.2 3,5.5 6,6.1 0.8,6.6 4.2,7.2", "#7cc0ee"),
    "meadow": rect(0, 5, SKY) + rect(5, 8, "#74c450") + rect(5, 5.25, "#5fae3f"),
    "desert": rect(0, 4, "#fdeac2") + rect(4, 8, "#e8b765") + shape("1,5 3.5,4 6.5,5", "#d79f4b"),
    "snow": rect(0, 5, "#a9cbe8") + stars("#ffffff", 5) + rect(5, 8, "#f4f8fd"),
    "night": rect(0, 6, "#18214f") + stars("#ffe9a6", 6) + rect(6, 8, "#0e1433"),
    "mountains": rect(0, 6, SKY)
    + "".join(shape(rock, "#7f8a99") + shape(cap, "#f4f8fd") for rock, cap in PEAKS)
    + rect(6, 8, "#74c450"),
    "city": rect(0, 6, "#c6e4f7") + skyline() + rect(6, 8, "#6d7278"),
    "forest": rect(0, 6, "#cdeccf")
    + "".join(shape(f"{x - 0.8},6 {x},{1.2 + x % 2 / 2} {x + 0.8},6", "#2f7d4a") for x in (1.3, 2.65, 4.0, 5.35, 6.7))
    + rect(6, 8, "#5a9e48"),
    "sunset": rect(0, 1.5, "#6a4390")
    + rect(1.5, 3, "#c2557f")
    + rect(3, 4.25, "#f0825a")
    + rect(4.25, 5, "#f9b85c")
    + dot(4, 5, 1.2, "#fff0b0")
    + rect(5, 8, "#4a3a78"),
    "road": rect(0, 4, SKY)
    + rect(4, 8, "#74c450")
    + shape("3.4,4 4.6,4 7.4,8 0.6,8", "#6d7278")
    + shape("3.93,4.6 4.07,4.6 4.1,5.4 3.9,5.4", "#ffffff")
    + shape("3.87,6 4.13,6 4.2,7.4 3.8,7.4", "#ffffff"),
    "room": rect(0, 6, "#f5e3c6") + rect(5.8, 6, "#d9b98e") + rect(6, 8, "#b07d4f"),
    "space": rect(0, 8, "#140f33") + stars("#ffffff"),
}


def draw_scene(name: str, width: int, height: int) -> np.ndarray:
    """The empty scene, float32 RGB in 0..1; `width` and `height` in pixels."""
    import resvg_py

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8" width="{width}" height="{height}" '
        f'preserveAspectRatio="none">{DRAWN[name]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    picture: np.ndarray = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float32) / 255
    assert picture.shape[:2] == (height, width)
    return picture
