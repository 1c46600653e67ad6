"""What routes ask FastAPI for: whose request it is, and the jobs. (`server.state.State` is the third.)"""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.errors import Unauthorized
from server.jobs.service import JobService
from server.state import State

bearer = HTTPBearer(scheme_name="access-token", description="Bearer key", auto_error=False)  # the refusal is ours


async def authenticate(
    request: Request, state: State, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> str:
    """The owner of what is asked for: the hash of the key; "" on a server without keys. Raises `Unauthorized`.

    A wrong key hears it late, where many came from its address.
    """
    try:
        return state.keys.authenticate(credentials.credentials if credentials else None)
    except Unauthorized:
        if credentials is not None and request.client is not None:
            await state.failed_keys.hold_back(request.client.host)
        raise


async def check_sent_key(request: Request, state: State) -> None:
    """What is open to all still refuses a wrong key, since clients test theirs there. Raises `Unauthorized`."""
    credentials = await bearer(request)
    if credentials is not None and credentials.credentials.strip():
        await authenticate(request, state, credentials)


async def get_jobs(request: Request) -> JobService:
    jobs: JobService = request.app.state.jobs
    return jobs


Owner = Annotated[str, Depends(authenticate)]
JobsDep = Annotated[JobService, Depends(get_jobs)]
