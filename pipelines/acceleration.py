"""What each `acceleration` preset does to the step loop.

A preset is a fixed mask from the number of steps: never a data-dependent threshold, so latency is constant and the
same request gives the same bytes. First and last steps are always computed.
"""

from collections.abc import Callable, Mapping

Mask = tuple[bool, ...]


def every_step(steps: int) -> Mask:
    """Compute all steps: the exact reference."""
    return (True,) * steps


PRESETS: Mapping[str, Callable[[int], Mask]] = {
    "none": every_step,
    "regular": every_step,
    "high": every_step,
}
