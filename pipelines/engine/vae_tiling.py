"""Decoding in overlapping tiles (diffusers' own): less memory, at the price of exactness.

Each tile is normalised by itself, and seams are blended: colours and details differ a little from the whole decode.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIDE = 512  # pixels of a tile; neighbours overlap by a quarter


@contextmanager
def tiles(vae: Any, scale: int) -> Iterator[None]:
    """Decode in tiles inside; `scale` is the number of pixels a latent is wide."""
    vae.tile_sample_min_size, vae.tile_latent_min_size = SIDE, SIDE // scale
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
