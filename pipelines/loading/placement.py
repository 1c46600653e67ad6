"""Where the parts of a model go: a table, and which row holds on a card.

The card's total memory alone decides, so that the same card always draws the same. Too little free memory is an error
that says who holds it, and never another row: that could be other pictures. No torch.
"""

import csv
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from weights.checkpoints import Checkpoint, ParameterCounts

WORKING = 4 * 2**30  # bytes beside the weights: activations at 1536x1536, decoding, CUDA itself; an estimate
STREAMED = 2**29  # bytes that streaming takes on the card: the layer at work and the next; T5's embedding has 0.24 GiB
BYTES = {"bfloat16": 2, "float32": 4}
GIB = 2**30
LIMIT = Path("/sys/fs/cgroup/memory.max")
TEXTS = ("text_encoder", "text_encoder_2")
FLOAT8 = "the blocks' weights in float8"


class DoesNotFit(Exception):
    """The model and the card's memory do not go together; the message says what would."""


class Card(NamedTuple):
    """A GPU. Memory in bytes."""

    name: str
    total: int
    free: int
    driver: str = ""


class Holder(NamedTuple):
    """A process that holds memory of a GPU, in bytes."""

    pid: str
    name: str
    held: int


class Way(NamedTuple):
    """A row. `streamed` parts wait in the host's memory; their layers come to the card as they compute.

    Streaming changes no bit; `float8` does. `auto` takes the first row that fits of those that are `chosen`.
    """

    says: str
    slower: str = ""
    streamed: tuple[str, ...] = ()
    float8: bool = False
    chosen: bool = True

    def on_card(self, sizes: ParameterCounts, precision: str) -> int:
        """Bytes, without what work takes."""
        number = BYTES[precision]
        transformer = sizes.blocks * (1 if self.float8 else number) + sizes.rest * number
        waiting = self.waiting(sizes, precision)
        return transformer + (sizes.texts + sizes.vae) * number - waiting + (STREAMED if waiting else 0)

    def waiting(self, sizes: ParameterCounts, precision: str) -> int:
        """Bytes in the host's memory."""
        number = BYTES[precision]
        transformer = sizes.blocks * (1 if self.float8 else number) + sizes.rest * number
        texts = sizes.texts * number if set(TEXTS) <= set(self.streamed) else 0
        return texts + (transformer if "transformer" in self.streamed else 0)


PROMPTS = "a new prompt waits for the text encoders to come to the card layer by layer"
STEPS = (
    "every step waits for the transformer, a new prompt waits for the text encoders, to come to the card layer by layer"
)
PLACEMENTS: Mapping[str, Way] = {
    "resident": Way("every part on the device"),
    "offload-text": Way("text encoders in the host's memory", PROMPTS, TEXTS),
    "float8": Way(f"{FLOAT8}, text encoders in the host's memory", PROMPTS, TEXTS, float8=True),
    "float8-offload": Way(
        f"{FLOAT8}, transformer and text encoders in the host's memory", STEPS, (*TEXTS, "transformer"), float8=True
    ),
    "offload": Way("transformer and text encoders in the host's memory", STEPS, (*TEXTS, "transformer"), chosen=False),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """What was decided. `needed` are the card's bytes, `host` those of the streamed parts in the host's memory; `room`
    is there where the card also holds the second copy of the blocks that the lever `fp8` makes."""

    name: str
    precision: str
    needed: int = 0
    host: int = 0
    room: bool = False

    @property
    def way(self) -> Way:
        return PLACEMENTS[self.name]

    @property
    def weights(self) -> str:
        """The precision, for people and for the fingerprint."""
        return f"{self.precision}, {FLOAT8}" if self.way.float8 else self.precision

    @property
    def notes(self) -> tuple[str, ...]:
        """What every reply must say of it."""
        return (f"precision: {self.weights} (placement {self.name})",) if self.way.float8 else ()

    def __str__(self) -> str:
        sizes = f"about {self.needed / GIB:.0f} GiB of its memory" if self.needed else "the model is small"
        held = f", {self.host / GIB:.0f} GiB of the host's memory" if self.host else ""
        slower = f"; {self.way.slower}" if self.way.slower else ""
        other = "; other pictures than bfloat16's" if self.way.float8 else ""
        room = "; room for a second copy of the blocks in float8 (SRPO_OPTIMIZATIONS=default,fp8)" if self.room else ""
        return f"{self.name}: {self.way.says}, in {self.precision}; {sizes}{held}{slower}{other}{room}"


def place(
    row: Checkpoint,
    precision: str,
    card: Card,
    holders: Sequence[Holder] = (),
    wanted: str = "auto",
    host: int | None = None,
) -> Placement:
    """Where the parts of a model go on this card: as `wanted`, or the first row that fits. Raises `DoesNotFit`, also
    where the `host`'s memory in bytes does not hold what waits there."""
    placed = {name: placement_of(row, precision, name) for name in PLACEMENTS}
    fitting = [name for name, placement in placed.items() if placement.needed <= card.total]
    chosen = [name for name in fitting if PLACEMENTS[name].chosen] if wanted == "auto" else [wanted]
    if not chosen or chosen[0] not in fitting:
        asked = placed[wanted] if wanted != "auto" else min(placed.values(), key=lambda placement: placement.needed)
        other = f"--placement {', '.join(fitting)} would fit" if fitting else "Use a larger card, or --devices cpu"
        raise DoesNotFit(
            f"{row.id} needs about {asked.needed / GIB:.0f} GiB with --placement {asked.name} in {precision}; "
            f"{card.name} has {card.total / GIB:.0f}. {other}"
        )
    placement = placed[chosen[0]]
    if placement.needed > card.free:
        named = ", ".join(f"{holder.name} (pid {holder.pid}) {holder.held / GIB:.1f} GiB" for holder in holders)
        raise DoesNotFit(
            f"{row.id} needs about {placement.needed / GIB:.0f} GiB with --placement {placement.name} in {precision}; "
            f"of {card.name}'s {card.total / GIB:.0f} only {card.free / GIB:.1f} are free. Held by: "
            f"{named or 'processes that cannot be seen from here'}. Free it, or choose another card with --devices"
        )
    if host is not None and placement.host > host:
        raise DoesNotFit(
            f"{row.id} with --placement {placement.name} keeps {placement.host / GIB:.0f} GiB in the host's memory, "
            f"which has {host / GIB:.0f}. Give it more, or choose another --placement or a larger card"
        )
    room = not placement.way.float8 and not placement.way.streamed and any(row.sizes)
    return replace(placement, room=room and placement.needed + row.sizes.blocks <= card.total)


def placement_of(row: Checkpoint, precision: str, name: str) -> Placement:
    """A row of the table for a model, whether it fits or not; `auto` is the first: what a CPU gets."""
    name = "resident" if name == "auto" else name
    if not any(row.sizes):
        return Placement(name, precision)
    way = PLACEMENTS[name]
    return Placement(name, precision, way.on_card(row.sizes, precision) + WORKING, way.waiting(row.sizes, precision))


def host_memory() -> int:
    """The host's memory in bytes, or what a container may take of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(LIMIT.read_text()))
    except (OSError, ValueError):  # no such control group, or "max"
        return total


def cards() -> list[Card]:
    """The machine's NVIDIA cards, as the driver tells; none where there is no driver."""
    rows = ask("--query-gpu=name,memory.total,memory.free,driver_version")
    return [Card(name, mebibytes(total), mebibytes(free), driver) for name, total, free, driver in rows]


def holders() -> list[Holder]:
    """Who holds memory of any card, the largest first."""
    rows = ask("--query-compute-apps=pid,process_name,used_memory")
    return sorted((Holder(pid, name, mebibytes(held)) for pid, name, held in rows), key=lambda holder: -holder.held)


def ask(query: str) -> list[list[str]]:
    """nvidia-smi's answer, row by row; nothing where it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return [[cell.strip() for cell in row] for row in csv.reader(ended.stdout.splitlines()) if row]


def mebibytes(text: str) -> int:
    """Bytes from nvidia-smi's MiB; 0 for what it does not know ("[N/A]")."""
    return int(text) * 2**20 if text.isdigit() else 0
