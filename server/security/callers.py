"""Whose request it is, and what that key may do and take."""

from dataclasses import dataclass
from typing import Literal, get_args

from server.errors import ScopeMissing

Scope = Literal["generate", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True)
class Quota:
    """What a key may take. None: no bound of its own, so that of the settings counts.

    `images_per_day`: images drawn and under way in a day of UTC. `concurrent_requests`: unfinished at a time.
    """

    images_per_day: int | None = None
    concurrent_requests: int | None = None
    requests_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `owner` is the key's id, the hash of a key from the settings, or "" on a server without keys."""

    owner: str
    scopes: frozenset[Scope] = frozenset()
    quota: Quota = Quota()

    def require(self, scope: Scope) -> None:
        """Raises `ScopeMissing`."""
        if scope not in self.scopes:
            raise ScopeMissing(scope, keyless=not self.owner)
