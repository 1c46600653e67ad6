"""Where the parts of a model are stored: a table, and which row is used on a card.

Only the card's total memory decides, so that the same card always draws the same pictures. Too little free memory is an
error that names the processes that hold it; another row could draw other pictures. A row fits if the largest image
does; where none does, or the operator names a row, the largest image may be smaller, and larger ones are refused. No
torch.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pipelines.allocator import rounds_pinned_memory
from pipelines.fields import Size
from pipelines.loading.cards import Card, Holder
from weights.checkpoints import Checkpoint, ParameterCounts

# Bytes beside weights and activations: CUDA itself, cuDNN's workspaces, what interleaved jobs keep. An estimate.
OVERHEAD = 7 * 2**28
CONTEXT = 2**29  # bytes of it that this process has taken before it asks how much is free; an estimate
ACTIVATIONS = 970  # bytes a pixel and byte of precision, of decoding, the greediest stage (`python -m bench.memory`)
LARGEST, SMALLEST = 1536 * 1536, 512 * 512  # pixels: what a card must draw to fit, and what is worth a start
STREAMED = 2**29  # bytes that streaming takes on the card: the layer at work and the next; T5's embedding has 0.24 GiB
BYTES = {"bfloat16": 2, "float32": 4}
GIB = 2**30
LIMIT = Path("/sys/fs/cgroup/memory.max")
TEXTS = ("text_encoder", "text_encoder_2")
FLOAT8 = "the blocks' weights in float8"


class DoesNotFit(Exception):
    """The model does not fit the memory; the message says what would fit."""


class PlacementSpec(NamedTuple):
    """A row. `streamed` parts are stored in the host's memory; each layer is copied to the card when it computes.

    `description` and `slowdown` are for people. Streaming changes no bit; `float8`, blocks stored in 8 bits, does.
    `auto` takes the first row that fits of those that are `automatic`.
    """

    description: str
    slowdown: str = ""
    streamed: tuple[str, ...] = ()
    float8: bool = False
    automatic: bool = True

    def card_bytes(self, sizes: ParameterCounts, precision: str) -> int:
        """Bytes on the card, without working memory."""
        size = BYTES[precision]
        transformer = sizes.blocks * (1 if self.float8 else size) + sizes.rest * size
        streamed = self.host_bytes(sizes, precision)
        return transformer + (sizes.texts + sizes.vae) * size - streamed + (STREAMED if streamed else 0)

    def copy_bytes(self, sizes: ParameterCounts) -> int:
        """Bytes on the card of the second copy of the blocks that the optimization `fp8` makes, where it makes one."""
        return 0 if self.float8 or "transformer" in self.streamed else sizes.blocks

    def host_bytes(self, sizes: ParameterCounts, precision: str) -> int:
        """Bytes in the host's memory; of `pinned` counts, with what the allocator may add to each tensor."""
        size = BYTES[precision]
        transformer = sizes.blocks * (1 if self.float8 else size) + sizes.rest * size
        texts = sizes.texts * size if set(TEXTS) <= set(self.streamed) else 0
        return texts + (transformer if "transformer" in self.streamed else 0)


PROMPTS_NOTE = "a new prompt waits for the text encoders to come to the card layer by layer"
STEPS_NOTE = (
    "every step waits for the transformer, a new prompt waits for the text encoders, to come to the card layer by layer"
)
PLACEMENTS: Mapping[str, PlacementSpec] = {
    "resident": PlacementSpec("every part on the device"),
    "offload-text": PlacementSpec("text encoders in the host's memory", PROMPTS_NOTE, TEXTS),
    "float8": PlacementSpec(f"{FLOAT8}, text encoders in the host's memory", PROMPTS_NOTE, TEXTS, float8=True),
    "float8-offload": PlacementSpec(
        f"{FLOAT8}, transformer and text encoders in the host's memory",
        STEPS_NOTE,
        (*TEXTS, "transformer"),
        float8=True,
    ),
    "offload": PlacementSpec(
        "transformer and text encoders in the host's memory", STEPS_NOTE, (*TEXTS, "transformer"), automatic=False
    ),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """A row for a model in a precision. `needed` are bytes on the card, `host` those of streamed parts in the host's
    memory. `room`: the card would also hold the second copy of the blocks that the optimization `fp8` makes; where that
    is wanted, it is one of the `needed`. `max_pixels`: those of the largest image that has room; None: all have."""

    name: str
    precision: str
    needed: int = 0
    host: int = 0
    room: bool = False
    max_pixels: int | None = None

    @property
    def spec(self) -> PlacementSpec:
        return PLACEMENTS[self.name]

    @property
    def weights(self) -> str:
        """The precision, for people and for the fingerprint."""
        return f"{self.precision}, {FLOAT8}" if self.spec.float8 else self.precision

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of every reply."""
        return (f"precision: {self.weights} (placement {self.name})",) if self.spec.float8 else ()

    def __str__(self) -> str:
        sizes = f"about {self.needed / GIB:.0f} GiB of its memory" if self.needed else "the model is small"
        held = f", {self.host / GIB:.0f} GiB of the host's memory" if self.host else ""
        slower = f"; {self.spec.slowdown}" if self.spec.slowdown else ""
        other = "; other pictures than bfloat16's" if self.spec.float8 else ""
        room = "; room for a second copy of the blocks in float8 (SRPO_OPTIMIZATIONS=default,fp8)" if self.room else ""
        limit = f"; images of up to {describe_pixels(self.max_pixels)}" if self.max_pixels else ""
        return f"{self.name}: {self.spec.description}, in {self.precision}; {sizes}{held}{slower}{other}{room}{limit}"


def choose_placement(
    checkpoint: Checkpoint,
    precision: str,
    card: Card,
    holders: Sequence[Holder] = (),
    wanted: str = "auto",
    host: int | None = None,
    processes: int = 1,
    fp8: bool = False,
) -> Placement:
    """The wanted row, or for `auto` the first that fits the card's total memory; never `offload`.

    One that fits with small images only is taken where it is wanted or no other fits. Raises `DoesNotFit` where no row
    or the wanted one does not fit, where too little of the card is free, and where the host's memory (`host` bytes) is
    too small for the streamed parts, which each of the `processes` that load the model has. `fp8`: the optimization of
    that name is wanted, too.
    """
    placement = find_fitting(checkpoint, precision, card, wanted, fp8)
    if placement.needed > card.free:
        named = ", ".join(f"{holder.name} (pid {holder.pid}) {holder.held / GIB:.1f} GiB" for holder in holders)
        raise DoesNotFit(
            f"{checkpoint.id} needs about {placement.needed / GIB:.0f} GiB with --placement {placement.name} in "
            f"{precision}; of {card.name}'s {card.total / GIB:.0f} only {card.free / GIB:.1f} are free. Held by: "
            f"{named or 'processes that cannot be seen from here'}. Free it, or choose another card with --devices"
        )
    if host is not None and placement.host * processes > host:
        place = "the host's memory" + (f" for each of {processes} devices" if processes > 1 else "")
        raise DoesNotFit(
            f"{checkpoint.id} with --placement {placement.name} keeps {placement.host / GIB:.0f} GiB in {place}, "
            f"which has {host / GIB:.0f}. Give it more, or choose another --placement or a larger card"
        )
    room = not fp8 and not placement.spec.float8 and not placement.spec.streamed and any(checkpoint.sizes)
    return replace(placement, room=room and placement.needed + checkpoint.sizes.blocks <= card.total)


def find_fitting(checkpoint: Checkpoint, precision: str, card: Card, wanted: str, fp8: bool) -> Placement:
    """The wanted row, or the first, that fits the card's total memory. Raises `DoesNotFit`."""
    candidates = {name: get_placement(checkpoint, precision, name, fp8=fp8) for name in PLACEMENTS}
    fitting = [name for name, placement in candidates.items() if placement.needed <= card.total]
    names = [name for name in PLACEMENTS if wanted == name or (wanted == "auto" and PLACEMENTS[name].automatic)]
    for name in names:
        if name in fitting:
            return candidates[name]
    for name in names:
        room = card.total - CONTEXT - OVERHEAD - (candidates[name].needed - working_bytes(LARGEST, precision))
        pixels = room // (ACTIVATIONS * BYTES[precision])
        if pixels >= SMALLEST:
            return replace(get_placement(checkpoint, precision, name, pixels, fp8), max_pixels=pixels)
    smallest = min(candidates.values(), key=lambda placement: placement.needed)
    refused = get_placement(checkpoint, precision, smallest.name if wanted == "auto" else wanted, SMALLEST, fp8)
    other = f"--placement {', '.join(fitting)} would fit" if fitting else "Use a larger card, or --devices cpu"
    raise DoesNotFit(
        f"{checkpoint.id} needs about {refused.needed / GIB:.0f} GiB with --placement {refused.name} in {precision}; "
        f"{card.name} has {card.total / GIB:.0f}. {other}"
    )


def working_bytes(pixels: int, precision: str) -> int:
    """Bytes beside the weights to draw images of up to so many pixels."""
    return OVERHEAD + ACTIVATIONS * BYTES[precision] * pixels


def describe_pixels(pixels: int) -> str:
    """For people: `1.60 megapixels (1280x1280)`."""
    square = Size.largest_square(pixels)
    return f"{pixels // (2**20 // 100) / 100} megapixels ({square.width}x{square.height})"


def get_placement(
    checkpoint: Checkpoint, precision: str, name: str, pixels: int = LARGEST, fp8: bool = False
) -> Placement:
    """A row of the table for a model, whether it fits or not; `auto` is the first row, which a CPU uses.

    `pixels` are those of the largest image. `fp8`: with the second copy that this optimization makes.
    """
    name = "resident" if name == "auto" else name
    if not any(checkpoint.sizes):
        return Placement(name, precision)
    spec, sizes = PLACEMENTS[name], checkpoint.sizes
    needed = spec.card_bytes(sizes, precision) + working_bytes(pixels, precision)
    needed += spec.copy_bytes(sizes) if fp8 else 0
    host = spec.host_bytes(checkpoint.pinned if rounds_pinned_memory(os.environ) else sizes, precision)
    return Placement(name, precision, needed, host)


def measure_host_memory() -> int:
    """The host's memory in bytes, or a container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(LIMIT.read_text()))
    except (OSError, ValueError):  # no such control group, or "max"
        return total
