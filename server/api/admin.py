"""What an operator does over HTTP: keys made, listed, revoked and rotated, and their usage.

It needs a key with the scope `admin`. A server without keys has no such key, so nobody who happens to reach it can shut
out the others: the first one is made by `srpo keys add --scopes admin`.
"""

import time
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError

from pipelines.fields import ParamType
from server.api.dependencies import with_scope
from server.api.query import QueryChoice
from server.errors import InvalidRequest, invalid_request
from server.schema import issues_of
from server.security.key_params import KeyParams, RotationParams
from server.security.store import describe_key
from server.state import AppState, State
from server.transport.json_body import read_object
from server.usage.ledger import choose_days
from server.usage.report import describe_usage, format_csv, parse_day

PRIVATE = {"cache-control": "no-store"}
M = TypeVar("M", bound=BaseModel)
router = APIRouter(prefix="/v1/admin", include_in_schema=False, dependencies=[Depends(with_scope("admin"))])


class QueryDay(ParamType):
    """A day in a query."""

    code = "invalid_query"

    @property
    def expected(self) -> str:
        return "a day such as 2026-11-26"

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "format": "date"}

    def parse(self, value: Any) -> str:
        try:
            return parse_day(value)
        except ValueError:
            raise self.refuse(value) from None


Day = Annotated[str | None, QueryDay(), Query()]
Key = Annotated[str | None, Query(description="Only this key's.")]
Form = Annotated[str, QueryChoice(("json", "csv")), Query(alias="format")]


@router.get("/usage")
async def show_usage(
    state: State, since: Day = None, until: Day = None, key: Key = None, form: Form = "json"
) -> Response:
    """What each key has used, a row a day of UTC: the last 30 days, if nothing else is asked for."""
    if since and until and until < since:
        expected = f"a day not before since, {since}"
        raise invalid_request(
            f"expected {expected}", path=("until",), code="invalid_query", expected=expected, received=until
        )
    first, last = choose_days(since, until)
    names = {record.id: record.name for record in await state.key_service.list()}
    records = await state.threads.run("database", state.usage.ledger.report, first, last, key)
    rows = [describe_usage(record, names) for record in records]
    if form == "csv":
        return Response(format_csv(rows), headers=PRIVATE, media_type="text/csv")
    return JSONResponse({"object": "list", "since": first, "until": last, "data": rows}, headers=PRIVATE)


@router.get("/keys")
async def list_keys(state: State) -> JSONResponse:
    """All keys, revoked ones too; never their text."""
    records = await state.key_service.list()
    return JSONResponse({"object": "list", "data": [describe_key(record) for record in records]}, headers=PRIVATE)


@router.post("/keys")
async def add_key(request: Request, state: State) -> JSONResponse:
    """Make a key. The reply is the only place that ever has its text."""
    key = await read_model(KeyParams, request, state)
    end = key.end(time.time())
    record, text = await state.key_service.change(lambda store: store.add(key.name, key.scopes, end, key.quota))
    return JSONResponse(describe_key(record) | {"key": text}, 201, headers=PRIVATE)


@router.delete("/keys/{identity}")
async def revoke_key(state: State, identity: str) -> JSONResponse:
    """End a key, for this server at once. Again: nothing to do."""
    return JSONResponse(describe_key(await state.key_service.change(lambda store: store.revoke(identity))))


@router.post("/keys/{identity}/rotate")
async def rotate_key(request: Request, state: State, identity: str) -> JSONResponse:
    """Another text for the same key."""
    grace = (await read_model(RotationParams, request, state)).grace
    record, text = await state.key_service.change(lambda store: store.rotate(identity, grace))
    return JSONResponse(describe_key(record) | {"key": text}, headers=PRIVATE)


async def read_model(kind: type[M], request: Request, state: AppState) -> M:
    """The body, where no body is one without fields. A field that does not exist is an error: it may be a limit.

    Raises `InvalidRequest`.
    """
    fields: dict[str, Any] = {}
    headers = request.headers
    if "transfer-encoding" in headers or int(headers.get("content-length", 0)):
        with state.uploads.open() as upload:
            fields = await read_object(request, state, upload)
    for name in fields:
        if name not in kind.model_fields:
            expected = f"one of {', '.join(kind.model_fields)}"
            raise invalid_request(
                f"there is no such field: expected {expected}",
                path=(name[:64],),
                code="unknown_field",
                expected=expected,
                received=ascii(name)[:80],
            )
    try:
        return kind.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise InvalidRequest(
            [issue for detail in error.errors(include_url=False) for issue in issues_of(detail)]
        ) from error
