"""The settings of torch's allocators for a worker, and what they add to pinned memory. No torch."""

from collections.abc import Mapping, MutableMapping
from importlib.metadata import version

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is its older name
# Segments that grow leave no gaps between jobs of different sizes, in which memory would be lost.
SEGMENTS = "expandable_segments:True"
# Pinned memory is rounded up to a power of two, so that it can be used again: 33 GiB for FLUX's 23 in float8. Above
# 8 MiB it is not, and is given back when freed, which may wait for the card. A large layer has 9 MiB or more, and
# what a request sends to the card is less, but for source pictures of more than 1.4 megapixels.
# pinned_max_round_threshold_mb alone will not do: torch 2.13 then keeps freed blocks of any size by their power of two,
# and takes one without a look at whether it is large enough.
PINNED = "pinned_max_cached_size_mb:8"
KNOWN_SINCE = (2, 13)  # the torch that PINNED was read in


def configure_allocator(environment: MutableMapping[str, str]) -> None:
    """Set the variable that torch reads when it is imported. An operator's own settings are kept."""
    if not any(name in environment for name in VARIABLES):
        environment[VARIABLES[0]] = choose_settings()


def choose_settings() -> str:
    major, minor = version("torch").split(".")[:2]
    return f"{SEGMENTS},{PINNED}" if (int(major), int(minor)) >= KNOWN_SINCE else SEGMENTS


def rounds_pinned_memory(environment: Mapping[str, str]) -> bool:
    """Whether a worker may round large pinned tensors up to powers of two: unless the settings hold our own."""
    own = [environment[name] for name in VARIABLES if name in environment]
    return PINNED not in ",".join(own or [choose_settings()]).split(",")
