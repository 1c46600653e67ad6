"""Stored images over HTTP: conditional requests, one byte range, HEAD. Images are small, so they are read whole."""

import re

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from server.errors import BadRange
from server.images.stores.base import Store
from server.state import State

router = APIRouter(include_in_schema=False)
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@router.api_route("/files/{name}", methods=["GET", "HEAD"])
async def get_file(request: Request, state: State, name: str) -> Response:
    """A stored image. No key: the name is the secret, and where links expire also their signature."""
    valid = state.store.links.check(name, request.query_params)
    if url := await state.threads.run("files", state.store.sign_url, name, request.method, valid):
        return RedirectResponse(url, 307, {"cache-control": "no-store"})
    return await state.threads.run("files", file_response, state.store, name, request, valid)


def file_response(store: Store, name: str, request: Request, valid: float) -> Response:
    """200, 206 or 304, to be kept for at most `valid` seconds. Raises `NotFound`, `Gone` or `BadRange`."""
    spec, image = request.headers, store.read(name)
    etag = f'"{name.partition(".")[0]}"'  # a name never gets other content
    headers = {
        "etag": etag,
        "cache-control": f"public, max-age={int(min(image.seconds_left, valid))}, immutable",
        "accept-ranges": "bytes",
    }
    if etag in spec.get("if-none-match", "") or spec.get("if-none-match") == "*":
        return Response(status_code=304, headers=headers)
    match = RANGE.fullmatch(spec.get("range", "").replace(" ", ""))
    if request.method != "GET" or not match or not is_range(*match.groups()) or spec.get("if-range", etag) != etag:
        return Response(image.data, media_type=image.content_type, headers=headers)
    start, end = bounds(match[1], match[2], len(image.data))
    headers["content-range"] = f"bytes {start}-{end - 1}/{len(image.data)}"
    return Response(image.data[start:end], 206, headers, image.content_type)


def is_range(first: str, last: str) -> bool:
    """Whether `first-last` is a range at all; one that is not is ignored (RFC 9110, 14.1.1)."""
    return bool(first or last) and not (first and last and int(last[:20]) < int(first[:20]))


def bounds(first: str, last: str, size: int) -> tuple[int, int]:
    """The half-open byte range of `first-last`; `-n` means the last n bytes. Raises `BadRange`."""
    start = int(first[:20]) if first else max(0, size - int(last[:20]))
    end = min(size, int(last[:20]) + 1) if first and last else size
    if start >= end:
        raise BadRange(size)
    return start, end
