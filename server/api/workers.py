"""What an operator does with the workers by hand: sleep, so that others can use the device, and wake."""

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from server.api.dependencies import AnyCaller
from server.state import AppState, State


async def check_operator(caller: AnyCaller) -> None:
    """Who may do it: a key with the scope `admin`; on a server without keys everybody, since a request undoes it.

    Raises `Unauthorized` or `ScopeMissing`.
    """
    if caller.owner:
        caller.require("admin")


router = APIRouter(prefix="/v1/admin", include_in_schema=False, dependencies=[Depends(check_operator)])


@router.post("/sleep")
async def sleep(state: State) -> JSONResponse:
    """Free the devices' memory until the next request. Raises `WorkersBusy` where there are unfinished ones."""
    state.pool.idleness.sleep()
    return describe(state)


@router.post("/wake")
async def wake(state: State) -> JSONResponse:
    """Start the workers that sleep, as the next request would. `GET /ready` follows them."""
    state.pool.idleness.wake()
    return describe(state)


def describe(state: AppState) -> JSONResponse:
    status = state.pool.status()
    return JSONResponse({"state": status.state, "eta_seconds": round(status.eta, 1)})
