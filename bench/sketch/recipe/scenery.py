"""The scenes that things stand on, drawn flat on a plane of which a picture is a window.

The canvas is the square from 0 to 8, in tokens; what is around it goes on for another canvas' side each way, since a
picture is at most three times as long as it is wide.
"""

import io

import numpy as np
from PIL import Image

from bench.sketch.recipe.layouts import CANVAS, window_start

SKY = "#9bd8f6"
FIRST, LAST = -CANVAS, 2 * CANVAS  # of the plane


def rect(top: float, bottom: float, colour: str) -> str:
    """A band across the whole plane."""
    return f'<rect x="{FIRST}" y="{top}" width="{LAST - FIRST}" height="{bottom - top}" fill="{colour}"/>'


def across(drawn: str) -> str:
    """The same on the canvas and on both sides of it."""
    return "".join(f'<g transform="translate({by} 0)">{drawn}</g>' for by in (-CANVAS, 0, CANVAS))


def below(drawn: str, canvases: int = 1) -> str:
    """The same so much farther down (up, if negative)."""
    return f'<g transform="translate(0 {canvases * CANVAS})">{drawn}</g>'


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
WAVES = bars("1,4.5 5,4.2 3,5.5 6,6.1 0.8,6.6 4.2,7.2", "#7cc0ee")
TREES = [round(1.3 + 1.35 * number, 2) for number in range(-6, 11)]
DRAWN = {
    "beach": rect(FIRST, 3.5, SKY) + rect(3.5, 5, "#2f93d6") + rect(5, LAST, "#f3d691"),
    "sea": rect(FIRST, 3.5, SKY) + rect(3.5, LAST, "#2f86cf") + across(WAVES + below(WAVES)),
    "meadow": rect(FIRST, 5, SKY) + rect(5, LAST, "#74c450") + rect(5, 5.25, "#5fae3f"),
    "desert": rect(FIRST, 4, "#fdeac2") + rect(4, LAST, "#e8b765") + across(shape("1,5 3.5,4 6.5,5", "#d79f4b")),
    "snow": rect(FIRST, 5, "#a9cbe8")
    + across(stars("#ffffff", 5) + below(stars("#ffffff"), -1))
    + rect(5, LAST, "#f4f8fd"),
    "night": rect(FIRST, 6, "#18214f")
    + across(stars("#ffe9a6", 6) + below(stars("#ffe9a6"), -1))
    + rect(6, LAST, "#0e1433"),
    "mountains": rect(FIRST, 6, SKY)
    + across("".join(shape(rock, "#7f8a99") + shape(cap, "#f4f8fd") for rock, cap in PEAKS))
    + rect(6, LAST, "#74c450"),
    "city": rect(FIRST, 6, "#c6e4f7") + across(skyline()) + rect(6, LAST, "#6d7278"),
    "forest": rect(FIRST, 6, "#cdeccf")
    + "".join(shape(f"{x - 0.8},6 {x},{1.2 + x % 2 / 2} {x + 0.8},6", "#2f7d4a") for x in TREES)
    + rect(6, LAST, "#5a9e48"),
    "sunset": rect(FIRST, 1.5, "#6a4390")
    + rect(1.5, 3, "#c2557f")
    + rect(3, 4.25, "#f0825a")
    + rect(4.25, 5, "#f9b85c")
    + dot(4, 5, 1.2, "#fff0b0")
    + rect(5, LAST, "#4a3a78"),
    "road": rect(FIRST, 4, SKY)
    + rect(4, LAST, "#74c450")
    + shape("3.4,4 4.6,4 13,16 -5,16", "#6d7278")
    + shape("3.93,4.6 4.07,4.6 4.1,5.4 3.9,5.4", "#ffffff")
    + shape("3.87,6 4.13,6 4.2,7.4 3.8,7.4", "#ffffff")
    + shape("3.75,8.6 4.25,8.6 4.4,11 3.6,11", "#ffffff"),
    "room": rect(FIRST, 6, "#f5e3c6") + rect(5.8, 6, "#d9b98e") + rect(6, LAST, "#b07d4f"),
    "space": rect(FIRST, LAST, "#140f33")
    + across("".join(below(stars("#ffffff"), canvases) for canvases in (-1, 0, 1))),
}


def draw_scene(name: str, width: int, height: int, token: int) -> np.ndarray:
    """The empty scene, float32 RGB in 0..1, `(height token, width token, 3)`; `width` and `height` in tokens."""
    import resvg_py

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * token}" height="{height * token}" '
        f'viewBox="{window_start(width)} {window_start(height)} {width} {height}">{DRAWN[name]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    picture: np.ndarray = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.float32) / 255
    assert picture.shape[:2] == (height * token, width * token)
    return picture
