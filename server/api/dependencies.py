"""What routes ask FastAPI for: whose request it is, and the jobs. (`server.state.State` is the third.)"""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.errors import Unauthorized
from server.jobs.service import JobService
from server.security.callers import Caller, Scope
from server.state import State

bearer = HTTPBearer(scheme_name="access-token", description="Bearer key", auto_error=False)  # the refusal is ours


async def authenticate(
    request: Request, state: State, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> Caller:
    """Whose key came with the request, whatever that may do. Raises `Unauthorized`.

    A wrong key hears it late, where many came from its address.
    """
    try:
        return state.keys.authenticate(credentials.credentials if credentials else None)
    except Unauthorized:
        if credentials is not None and request.client is not None:
            await state.failed_keys.hold_back(request.client.host)
        raise


AnyCaller = Annotated[Caller, Depends(authenticate)]


def with_scope(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    """A dependency that is the caller, who needs the scope. Raises `Unauthorized` or `ScopeMissing`."""

    async def check(caller: AnyCaller) -> Caller:
        caller.require(scope)
        return caller

    return check


async def check_sent_key(request: Request, state: State) -> None:
    """What is open to all still refuses a wrong key, since clients test theirs there. Raises `Unauthorized`."""
    sent = request.headers.get("authorization", "").strip()
    if sent and sent.lower() != "bearer":
        await authenticate(request, state, await bearer(request))


async def get_jobs(request: Request) -> JobService:
    jobs: JobService = request.app.jobs
    return jobs


Drawer = Annotated[Caller, Depends(with_scope("generate"))]


async def get_owner(caller: Drawer) -> str:
    return caller.owner


Owner = Annotated[str, Depends(get_owner)]
JobsDep = Annotated[JobService, Depends(get_jobs)]
