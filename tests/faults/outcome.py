"""A fault, what is counted while it holds, and the row that comes of it."""

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support.server import LiveServer

MIB = 2**20


@dataclass
class Tally:
    """What became of requests. A fault counts in here those that it sends itself."""

    offered: int = 0
    accepted: int = 0  # not refused
    finished: int = 0
    lost: int = 0  # accepted, and never answered
    duplicated: int = 0  # answered twice with one work's identity, or drawn twice
    wrong: int = 0  # bytes that a quiet server would not have drawn
    attacks: int = 0  # requests that are not good ones
    let_through: list[str] = field(default_factory=list)  # what they got and must not get
    deaths: int = 0  # of workers, by the fault itself
    struck: float | None = None  # when, on the monotonic clock, for a fault of one moment
    figure: str = ""


@dataclass(frozen=True)
class Server:
    """A server that the faults of one group share: its settings, and the size of its disk where that is to be full."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    disk: str | None = None

    def __hash__(self) -> int:
        return hash(self.name)


Hold = Callable[[LiveServer, Tally], AbstractContextManager[object]]


@dataclass(frozen=True)
class Fault:
    """A row of the table. `hold` returns when the fault holds, and ends it; good requests are sent in between.

    `incidents` are the numbers of `faults.incidents`; `draws` and `reads` good requests for images, and for the list of
    models.
    """

    case: str
    incidents: str
    hold: Hold
    server: Server
    draws: int = 3
    reads: int = 0


@dataclass(frozen=True)
class Outcome:
    """A row as it is printed. `recovery`: seconds from a strike, or a fault's end, to the next good reply.

    `slower`: what a good request took at the median, as a multiple of what it took before. `peak`: MiB of the API
    process beyond those before the fault.
    """

    case: str
    incidents: str
    offered: int
    accepted: int
    finished: int
    lost: int
    duplicated: int
    wrong: int
    let_through: str
    false_restarts: int
    slower: str
    health_p99_ms: str
    recovery_s: str
    peak_mib: str
    figure: str

    @property
    def sound(self) -> bool:
        attacked = int(self.let_through.split()[0]) if self.let_through else 0
        return not (self.lost or self.duplicated or self.wrong or attacked or self.false_restarts)

    def __str__(self) -> str:
        return " | ".join(str(value) for value in asdict(self).values())


def show_through(tally: Tally) -> str:
    return f"{len(tally.let_through)} of {tally.attacks}" if tally.attacks else ""


def show_ratio(during: list[float], before: list[float]) -> str:
    return f"{statistics.median(during) / statistics.median(before):.1f}" if during and before else ""


def show_p99(seconds: list[float]) -> str:
    return f"{1000 * sorted(seconds)[int(0.99 * (len(seconds) - 1))]:.0f}" if seconds else ""


def peak_memory(server: LiveServer) -> int:
    """Bytes of the API process's resident memory at most since `reset_peak`."""
    return int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def reset_peak(server: LiveServer) -> None:
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
