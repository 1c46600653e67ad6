"""Whether this server lives, and whether it is ready to draw."""

import math
from dataclasses import asdict

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.state import State
from weights.checkpoints import CHECKPOINTS

router = APIRouter(include_in_schema=False)


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(state: State) -> JSONResponse:
    """Alive, and what is being served. Always 200 while this process answers."""
    status = asdict(state.pool.status())
    info = status.pop("info") or {}
    if info:
        info["levers"] = info.pop("optimizations")  # the name that monitoring knows
    embedded = CHECKPOINTS[state.served].embedded
    safety = state.guard.description | {"prompts": state.prompts.description}
    return JSONResponse(
        {"status": "ok", "served_model": state.served, "embedded": embedded, "safety": safety} | status | info
    )


@router.api_route("/ready", methods=["GET", "HEAD"])
async def ready(state: State) -> JSONResponse:
    """200 when a request would be drawn now; else 503 with the stage of loading."""
    status = state.pool.status()
    body = {
        "ready": status.state == "ready",
        "state": status.state,
        "stage": status.stage,
        "progress": round(status.progress, 3),
        "eta_seconds": round(status.eta, 1),
    }
    if status.state == "ready":
        return JSONResponse(body)
    return JSONResponse(body, 503, {"retry-after": str(max(1, math.ceil(status.eta)))})
