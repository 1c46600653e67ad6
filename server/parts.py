"""What the routes work with: one value, made by `create_app`."""

from dataclasses import dataclass

from starlette.requests import Request

from pipelines.safety.guard import Guard
from pipelines.safety.prompts import PromptGuard
from pipelines.workers.pool import WorkerPool
from server.auth import KeyRing
from server.inputs import Sources
from server.origin import Origins
from server.settings import Settings
from server.store import LocalStore


@dataclass(frozen=True, slots=True)
class Server:
    """The parts of one app."""

    settings: Settings
    pool: WorkerPool
    store: LocalStore
    keys: KeyRing
    guard: Guard
    prompts: PromptGuard
    origins: Origins
    sources: Sources
    served: str  # id of the row in weights.checkpoints that the workers load


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server
