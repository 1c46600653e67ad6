"""What each `acceleration` preset does to the step loop: which steps it computes. No torch.

A preset is a fixed mask from the number of steps: never a data-dependent threshold, so latency is constant and the
same request gives the same bytes. A skipped step runs the first block only (`residual.py`). The first steps and the
last one are always computed, and a run of up to `WHOLE` + 1 steps is computed whole: too little is left to save.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import ceil

Mask = tuple[bool, ...]

WHOLE = 7  # steps that are always computed, however many are asked for
LEADING = 3  # of them at the start: the layout is decided there, and extrapolation needs two computed steps behind it


def every_step(steps: int) -> Mask:
    """Compute all steps: the exact reference."""
    return (True,) * steps


def sparse(share: Fraction) -> Callable[[int], Mask]:
    """Compute `share` of the steps beyond `WHOLE`: the leading ones, then evenly up to the last."""

    def mask(steps: int) -> Mask:
        if steps <= WHOLE:
            return every_step(steps)
        spread = WHOLE + ceil((steps - WHOLE) * share) - LEADING
        later = {LEADING - 1 + (steps - LEADING) * turn // spread for turn in range(1, spread + 1)}
        return tuple(step < LEADING or step in later for step in range(steps))

    return mask


PRESETS: Mapping[str, Callable[[int], Mask]] = {
    "none": every_step,
    "regular": sparse(Fraction(8, 21)),  # 15 of 28
    "high": sparse(Fraction(3, 21)),  # 10 of 28
}
