"""What is said of a key when it is made or rotated, over HTTP and on the command line alike."""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from pipelines.fields import Choice, Integer, Number, ParamType, Text
from server.security.callers import SCOPES, Quota, Scope
from server.settings.limits import MAX_KEY_TIME, MAX_RATE

MAX_COUNT = 2**31 - 1  # what a column of the database can hold
DEFAULT_SCOPES: tuple[Scope, ...] = ("generate",)


class Scopes(ParamType):
    """A list of scopes."""

    code = "invalid_scopes"

    @property
    def expected(self) -> str:
        return f"a list of some of {', '.join(SCOPES)}"

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": Choice(SCOPES).schema(), "minItems": 1}

    def parse(self, value: Any) -> tuple[Scope, ...]:
        if not isinstance(value, list | tuple) or not value or not all(scope in SCOPES for scope in value):
            raise self.refuse(value)
        return tuple(scope for scope in SCOPES if scope in value)


class Name(Text):
    """A name that can be shown in a line."""

    @property
    def expected(self) -> str:
        return f"a printable string of {self.low} to {self.high} characters"

    def parse(self, value: Any) -> str:
        name = super().parse(value)
        if not name.isprintable():
            raise self.refuse(value)
        return name


KeyName = Annotated[str, Name(1, 64)]
KeyScopes = Annotated[tuple[Scope, ...], Scopes()]
Lifetime = Annotated[float, Number(1, MAX_KEY_TIME)]
Grace = Annotated[float, Number(0, MAX_KEY_TIME)]
Count = Annotated[int, Integer(1, MAX_COUNT)]


class KeyParams(BaseModel):
    """A key to be made. `expires_in` is in seconds; what is left out has no bound of its own."""

    name: KeyName = Field("unnamed", description="whose it is, for lists")
    scopes: KeyScopes = Field(DEFAULT_SCOPES, description=f"what it may do, separated by commas: {', '.join(SCOPES)}")
    expires_in: Lifetime | None = Field(None, description="how long it is valid: 12h, 30d; none: until it is revoked")
    images_per_day: Count | None = Field(None, description="images in a day of UTC; none: as SRPO_KEY_IMAGES says")
    concurrent_requests: Count | None = Field(
        None, description="unfinished requests at a time; none: as SRPO_KEY_REQUESTS says"
    )
    requests_per_minute: Annotated[int, Integer(1, MAX_RATE)] | None = Field(
        None, description="requests for images a minute; none: as SRPO_KEY_RATE says"
    )

    @property
    def quota(self) -> Quota:
        return Quota(self.images_per_day, self.concurrent_requests, self.requests_per_minute)

    def end(self, now: float) -> float | None:
        """When a key that is made at `now` ends; both in Unix seconds."""
        return None if self.expires_in is None else now + self.expires_in


class RotationParams(BaseModel):
    """How long, in seconds, a key's text before is still valid."""

    grace: Grace = Field(0.0, description="how long the text before is still valid: 15m, 12h")
