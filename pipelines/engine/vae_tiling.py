"""Decoding in overlapping tiles (diffusers' own): less memory, at the price of exactness.

Each tile is normalised by itself and seams are blended: colours and details differ a little from decoding at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIDE = 512  # pixels of a tile; neighbours overlap by a quarter


@contextmanager
def decode_in_tiles(vae: Any, scale: int) -> Iterator[None]:
    """Let the VAE decode in tiles within this context; `scale` is the number of pixels on a side of a latent."""
    vae.tile_sample_min_size, vae.tile_latent_min_size = SIDE, SIDE // scale
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
