"""What the pool says of itself: to `/health`, to `/ready` and to whoever it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.engine.base import EngineInfo

Rest = Literal["none", "asleep", "waking"]
WORKER_STATES = ("loading", "ready", "restarting", "suspended", "failed", "asleep", "waking")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One device's worker. `state` is one of `WORKER_STATES`.

    A worker is `suspended` while so many have died that it is tried only slowly. It is `asleep` when it was ended
    because nobody needs it, and `waking` when it is started again after that.
    """

    device: str
    state: str
    stage: str
    progress: float
    eta: float
    pid: int | None
    running: int
    restarts: int
    failure: str | None


POOL_STATES = ("loading", "ready", "restarting", "suspended", "failed", "draining", "asleep", "waking")
SERVING = ("ready", "asleep", "waking")  # a request is accepted, and drawn without anybody's help


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """What the pool is doing. `state` is one of `POOL_STATES`; `ready` if a worker is."""

    state: str
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
