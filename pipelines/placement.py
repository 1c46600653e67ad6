"""Whether a model fits a card: decided by the card's total memory alone, so that the same card always draws the same.

Everything is resident, in one precision. Too little free memory is an error that says who holds it, and never another
precision: that would be other pictures. No torch here.
"""

import csv
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weights.checkpoints import Checkpoint

WORKING = 4 * 2**30  # bytes beside the weights: activations at 1536x1536, the VAE's decoding, CUDA itself; an estimate
BYTES = {"bfloat16": 2, "float32": 4}
GIB = 2**30


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


@dataclass(frozen=True, slots=True)
class Placement:
    """What stays where, and the bytes it takes."""

    precision: str
    needed: int

    def __str__(self) -> str:
        return f"all parts resident in {self.precision}: about {self.needed / GIB:.0f} GiB"


def place(row: Checkpoint, precision: str, card: Card, holders: Sequence[Holder] = ()) -> Placement:
    """Where the parts of a model go on this card. Raises `DoesNotFit`."""
    weights = row.parameters * BYTES[precision]
    placement = Placement(precision, weights + WORKING if weights else 0)
    if placement.needed > card.total:
        smaller = "" if precision == "bfloat16" else " (--dtype bfloat16 halves that)"
        raise DoesNotFit(
            f"{row.id} needs about {placement.needed / GIB:.0f} GiB in {precision}{smaller}; {card.name} has "
            f"{card.total / GIB:.0f}. Use a larger card, or --device cpu, which is very slow; lower precisions and "
            "offloading are not offered yet"
        )
    if placement.needed > card.free:
        named = ", ".join(f"{holder.name} (pid {holder.pid}) {holder.held / GIB:.1f} GiB" for holder in holders)
        raise DoesNotFit(
            f"{row.id} needs about {placement.needed / GIB:.0f} GiB in {precision}; of {card.name}'s "
            f"{card.total / GIB:.0f} only {card.free / GIB:.1f} are free. Held by: "
            f"{named or 'processes that cannot be seen from here'}. Free it, or choose another card with --devices"
        )
    return placement


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
