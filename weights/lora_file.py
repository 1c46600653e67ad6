"""Which LoRA to merge, and how strongly: `FILE` or `FILE:SCALE`. Without torch, so that the settings can check it."""

from math import isfinite
from pathlib import Path


def parse_lora(text: str) -> tuple[Path, float]:
    """The file, and the factor for what it adds (1 where none is given).

    A file of exactly this name wins, so a name may hold a colon. Raises `ValueError` for a scale that is no finite
    number.
    """
    file, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        factor = float(scale)
    except ValueError:
        factor = float("nan")
    if not file or not isfinite(factor):
        raise ValueError(f"{text!r}: expected FILE or FILE:SCALE, with a number as the scale (there is no such file)")
    return Path(file), factor
