"""Reads the body of a request as a JSON object, and refuses what would cause failures later.

NaN and infinities, lone surrogates, bodies that are too large, too slow or too deep never reach a validator.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from starlette.requests import Request

from server.errors import BodyTimeout, BodyTooLarge, InvalidRequest, invalid_request
from server.security.limits import Upload
from server.state import AppState

TOO_LARGE = "a number is too large"
AT_ONCE = 2**16  # bytes; a larger body is parsed in a thread
MAX_VALUES = 100_000  # counted by their punctuation, also where it is inside of a text
COMPRESSED = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")  # others are no codings, and change nothing
KINDS = {"NoneType": "null", "list": "an array", "str": "a string", "bool": "a boolean"}  # the rest are numbers
PIECE = 2**16  # bytes
DRAINED = 2**26  # bytes of an oversized body that are read and dropped, so that the client hears the 413


def invalid_json(problem: str) -> InvalidRequest:
    return invalid_request(
        f"the body is not valid JSON: {problem}", code="invalid_json", expected="a JSON object", received=problem
    )


async def read_object(request: Request, state: AppState, upload: Upload) -> dict[str, Any]:
    """The body as a JSON object, of the size and within the time that the settings allow. It counts as `upload`."""
    raw = bytearray()
    async with expect_body(request, "application/json", state.settings.body_timeout):
        async for chunk in chunks_of(request, state.settings.max_body, "The request body", upload):
            raw += chunk
    if len(raw) <= AT_ONCE:
        return parse_object(raw)
    return await state.threads.run("bodies", parse_object, raw)


@asynccontextmanager
async def expect_body(request: Request, content_type: str, seconds: float) -> AsyncIterator[None]:
    """Read a body of this type inside, within `seconds`.

    Raises `InvalidRequest` for another type or one that is compressed, or `BodyTimeout`.
    """
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding in COMPRESSED:
        raise invalid_request(
            f"{coding} is not taken: send the body as it is",
            path=("content-encoding",),
            code="invalid_content_encoding",
            expected="none",
            received=ascii(coding),
        )
    received = request.headers.get("content-type", "none")
    if received.partition(";")[0].strip().lower() != content_type:
        raise invalid_request(
            f"expected {content_type}, received {ascii(received)[:80]}",
            path=("content-type",),
            code="invalid_content_type",
            expected=content_type,
            received=ascii(received)[:80],
        )
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise BodyTimeout(seconds) from None


async def chunks_of(request: Request, limit: int, what: str, upload: Upload) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises `BodyTooLarge`, of `what`, after it; `UploadsFull` where `upload` finds no room.

    Of one that is too large a bounded part is drained: clients read no reply while they send.
    """
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            upload.add(len(chunk))
            yield chunk
        elif size > limit + DRAINED:
            break
    if size > limit:
        raise BodyTooLarge(limit, what)


def parse_object(raw: bytes | bytearray) -> dict[str, Any]:
    """Strict JSON: UTF-8, an object, finite numbers, no lone surrogates, and no more values than a request can need.

    Python's parser keeps all other threads waiting, so millions of values would stop the server for seconds.
    """
    if has_more_values(raw, MAX_VALUES):
        raise invalid_json(f"it holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=refuse_constant, parse_float=parse_finite)
    except UnicodeDecodeError:
        raise invalid_json("it is not UTF-8") from None
    except RecursionError:
        raise invalid_json("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise invalid_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # from our hooks; or from int(), of an integer with thousands of digits
        raise invalid_json(TOO_LARGE if "digits" in str(error) else str(error)) from None
    if not isinstance(value, dict):
        kind = KINDS.get(type(value).__name__, "a number")
        raise invalid_request(
            f"expected a JSON object, received {kind}", code="invalid_body", expected="a JSON object", received=kind
        )
    if b"\\u" in raw:  # only an escape can make a surrogate; raw UTF-8 cannot hold one
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid_json("it contains a lone surrogate") from None
    return value


def has_more_values(raw: bytes | bytearray, most: int) -> bool:
    """Whether the punctuation is that of more values; a piece at a time, since all other threads wait for each."""
    found = 0
    for start in range(0, len(raw), PIECE):
        found += sum(raw.count(mark, start, start + PIECE) for mark in b",:[{")
        if found > most:
            return True
    return False


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def parse_finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(TOO_LARGE)
    return number
