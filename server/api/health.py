"""Whether this server lives, and whether it is ready to draw. Neither needs a key: a load balancer has none."""

import math
from dataclasses import asdict
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from pipelines.workers.status import SERVING, PoolStatus
from server.api.dependencies import JobsDep, authenticate, bearer
from server.errors import Unauthorized
from server.jobs.service import JobService
from server.state import AppState, State
from weights.checkpoints import CHECKPOINTS

router = APIRouter(include_in_schema=False)


OPEN = ("state", "stage", "progress", "eta", "waiting", "running")  # of the pool's status, for everybody


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request, state: State, jobs: JobsDep) -> JSONResponse:
    """Alive, and what is being served. Always 200 while this process answers.

    Where keys are set, who has none hears nothing of processes, devices, hooks and failures.
    """
    status = asdict(state.pool.status())
    info = status.pop("info") or {}
    about: dict[str, Any] = {
        "status": "ok",
        "served_model": state.served,
        "embedded": CHECKPOINTS[state.served].embedded,
    }
    if not await has_key(request, state):
        return JSONResponse(about | {name: status[name] for name in OPEN})
    about["safety"] = state.guard.description | {"prompts": state.prompts.description}
    about["constant_images"] = state.constant.count
    about["trouble"] = jobs.find_trouble()
    about["replica"] = jobs.replica
    about["loop_lag"] = round(request.app.loop_watch.lag, 3)
    return JSONResponse(about | status | info)


async def has_key(request: Request, state: State) -> bool:
    """Whether all may be told. A wrong key is none here, since a probe must not fail by it; but it is held back."""
    try:
        await authenticate(request, state, await bearer(request))
    except Unauthorized:
        return False
    return True


class Readiness(NamedTuple):
    """Whether a request would be drawn now. `reason`: why not, where it is more than that the model loads."""

    ready: bool
    status: PoolStatus
    reason: str | None


def find_readiness(state: AppState, jobs: JobService) -> Readiness:
    status, trouble = state.pool.status(), jobs.find_trouble()
    if status.state == "suspended":
        trouble = "the workers have died again and again, so one is tried only now and then"
    return Readiness(status.state in SERVING and trouble is None, status, trouble)


@router.api_route("/ready", methods=["GET", "HEAD"])
async def ready(state: State, jobs: JobsDep) -> JSONResponse:
    """200 when a request would be drawn, at once or after workers that sleep are awake; else 503 with the stage."""
    is_ready, status, reason = find_readiness(state, jobs)
    body = {
        "ready": is_ready,
        "state": status.state,
        "stage": status.stage,
        "progress": round(status.progress, 3),
        "eta_seconds": round(status.eta, 1),
    }
    if is_ready:
        return JSONResponse(body)
    if reason is not None:
        body["reason"] = reason
    return JSONResponse(body, 503, {"retry-after": str(max(1, math.ceil(status.eta)))})
