"""How long to wait between tries of what may work again by itself."""

from collections.abc import Iterator


def pauses(first: float, longest: float) -> Iterator[float]:
    """The seconds before one try after the other: `first`, then twice as many each time, up to `longest`. No end."""
    pause = first
    while True:
        yield pause
        pause = min(longest, 2 * pause)
