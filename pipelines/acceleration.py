"""Which denoising steps each `acceleration` preset computes. No torch.

A preset is a fixed mask from the number of steps: never a data-dependent threshold, so latency is constant and the
same request gives the same bytes. A skipped step runs the first block only (`engine/forward.py`). The first
steps and the last one are always computed, and so is every step of a run of up to `MIN_COMPUTED` + 1 steps.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import ceil

Mask = tuple[bool, ...]

MIN_COMPUTED = 7  # steps that are computed at least, however many are asked for
LEADING_STEPS = 3  # always computed: they decide the layout, and extrapolation needs two computed steps before it


def compute_all(steps: int) -> Mask:
    """Compute all steps: the exact reference."""
    return (True,) * steps


def compute_share(share: Fraction) -> Callable[[int], Mask]:
    """Compute `share` of the steps beyond `MIN_COMPUTED`: the leading ones, then evenly up to the last."""

    def mask(steps: int) -> Mask:
        if steps <= MIN_COMPUTED:
            return compute_all(steps)
        spread = MIN_COMPUTED + ceil((steps - MIN_COMPUTED) * share) - LEADING_STEPS
        later = {LEADING_STEPS - 1 + (steps - LEADING_STEPS) * index // spread for index in range(1, spread + 1)}
        return tuple(step < LEADING_STEPS or step in later for step in range(steps))

    return mask


PRESETS: Mapping[str, Callable[[int], Mask]] = {
    "none": compute_all,
    "regular": compute_share(Fraction(8, 21)),  # 15 of 28
    "high": compute_share(Fraction(3, 21)),  # 10 of 28
}
