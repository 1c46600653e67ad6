"""What the pool says of itself: to `/health`, to `/ready` and to whoever it refuses."""

from dataclasses import dataclass

from pipelines.engine.base import EngineInfo
from pipelines.workers.supervisor import WorkerStatus

POOL_STATES = ("loading", "ready", "restarting", "suspended", "failed", "draining")


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


def format_failure(worker: WorkerStatus, alone: bool) -> str:
    """Why a worker does not serve; with its device, where there are several workers."""
    return worker.failure or "" if alone else f"{worker.device}: {worker.failure}"
