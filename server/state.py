"""What the routes work with: one value, made by `create_app`."""

from dataclasses import dataclass

from starlette.requests import Request

from pipelines.safety.guard import Guard
from pipelines.safety.prompts import PromptGuard
from pipelines.workers.pool import WorkerPool
from server.images.source import Sources
from server.images.store import LocalStore
from server.security.keys import KeyRing
from server.security.origins import OriginPolicy
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class AppState:
    """The parts of one app."""

    settings: Settings
    pool: WorkerPool
    store: LocalStore
    keys: KeyRing
    guard: Guard
    prompts: PromptGuard
    origins: OriginPolicy
    sources: Sources
    served: str  # id of the row in weights.checkpoints that the workers load


def get_app_state(request: Request) -> AppState:
    server: AppState = request.app.state.server
    return server
