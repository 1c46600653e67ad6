"""What the pool says of itself: to `/health`, to `/ready` and to whoever it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipelines.engine.base import EngineInfo

WorkerState = Literal["loading", "ready", "restarting", "suspended", "failed", "asleep", "waking", "stopped"]
WORKER_STATES: tuple[WorkerState, ...] = get_args(WorkerState)
PoolState = Literal["loading", "ready", "restarting", "suspended", "failed", "draining", "asleep", "waking"]
POOL_STATES: tuple[PoolState, ...] = get_args(PoolState)
SERVING: tuple[PoolState, ...] = (
    "ready",
    "asleep",
    "waking",
)  # a request is accepted, and drawn without anybody's help


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One device's worker.

    It is `loading` until the device has had a worker that was ready, and `restarting` after the death of one. It is
    `suspended` while so many have died that one is tried only slowly, until one is ready. It is `asleep` when it was
    ended because nobody needs it, and `waking` when it is started again after that. A device that has `failed` gets no
    worker any more, nor one whose supervisor is `stopped`.
    """

    device: str
    state: WorkerState
    stage: str
    progress: float
    eta: float
    pid: int | None
    running: int
    restarts: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What the pool is doing: `ready` if a worker is."""

    state: PoolState
    stage: str
    progress: float
    eta: float
    waiting: int
    running: int
    restarts: int
    worker_pids: tuple[int, ...]
    info: EngineInfo | None
    failure: str | None
    workers: tuple[WorkerStatus, ...] = ()


def join_failures(workers: Sequence[WorkerStatus]) -> str | None:
    """Why workers do not serve, a line each, with their devices where there are several."""
    alone = len(workers) == 1
    return (
        "\n".join(
            worker.failure if alone else f"{worker.device}: {worker.failure}" for worker in workers if worker.failure
        )
        or None
    )
