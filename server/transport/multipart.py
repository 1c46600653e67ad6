"""From the bytes of a multipart form to fields and one picture: how OpenAI's `images.edit` sends a request.

A picture may be larger than any other body, so it is written to a nameless temporary file as it comes.
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pipelines.fields import Boolean, Integer, Issue, Number
from pipelines.image_formats import ANY_TITLE
from pipelines.request import PARAM_TYPES
from server.errors import BodyTooLarge, InvalidRequest, StorageFull, invalid_request
from server.jobs.spec import PLACEHOLDER_URL
from server.schema import issue_of
from server.security.limits import Upload
from server.settings.server import Settings
from server.translation.aliases import ALIASES
from server.transport.json_body import chunks_of, expect_body

PICTURE = re.compile(r"image(\[\d*\])?")  # as a member of a list it is `image[]`
NUMBER = re.compile(r"-?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,2})?", re.ASCII)
OPTIONAL = {"model", *PARAM_TYPES} - {"prompt"}  # a form has no null: one that is empty is absent
UTF8 = (b"utf-8", b"utf8")
MAX_FIELDS = 100
PIECE = 2**20
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # its warnings quote the body


@dataclass(frozen=True)
class Form:
    """A form that was read: its fields, the first picture as an open file, and names for the pictures after it."""

    fields: dict[str, Any]
    picture: BinaryIO | None
    unused: list[str]


async def read_form(request: Request, settings: Settings, upload: Upload) -> Form:
    """The fields, numbers and switches as such, and the picture, which the caller closes. The form counts as `upload`.

    Raises `InvalidRequest` and as `read_object` does; `StorageFull` where there is no room for the picture.
    """
    max_text, max_picture = settings.max_body, settings.max_upload
    async with expect_body(request, "multipart/form-data", settings.body_timeout):
        form = await parse(request, max_text, max_picture, upload)
    texts = [(name, part) for name, part in form.multi_items() if isinstance(part, str)]
    fields = {name: parse_field(name, part) for name, part in texts if part or name not in OPTIONAL}
    files = [(name, part) for name, part in form.multi_items() if isinstance(part, UploadFile)]
    try:
        if sum(len(part) for part in fields.values() if isinstance(part, str)) > max_text:
            raise BodyTooLarge(max_text, "The form's text")
        pictures = find_pictures(files, max_picture)
        picture = pictures[0] if pictures else None
        if picture is not None:
            fields["image_url"] = PLACEHOLDER_URL
        elif not {"image", "image_url"} & set(fields):
            raise no_picture(f"a {ANY_TITLE} file")
    except Exception:
        await form.close()
        raise
    for unused in pictures[1:]:
        unused.close()
    return Form(fields, picture, [f"image.{number}" for number in range(1, len(pictures))])


async def parse(request: Request, max_text: int, max_picture: int, upload: Upload) -> FormData:
    """Every part; files are on disk. A refused body is read to its end: a client that still sends reads no reply."""
    _, parameters = parse_options_header(request.headers["content-type"])
    if parameters.get(b"charset", b"utf-8").lower() not in UTF8:  # Python's other codecs may take hours for a field
        raise invalid_form("its charset is not utf-8", "a form in utf-8", "another charset")
    limit = max_text + max_picture
    body = chunks_of(request, limit, f"The form, with a picture of at most {max_picture:,} bytes,", upload)
    limits = {"max_files": MAX_FIELDS, "max_fields": MAX_FIELDS, "max_part_size": limit}
    try:
        return await MultiPartParser(request.headers, body, **limits).parse()
    except MultiPartException as error:
        async for _ in body:
            pass
        raise invalid_form(error.message, "a multipart form", "a broken one") from error
    except OSError as error:
        raise StorageFull from error


def invalid_form(problem: str, expected: str, received: str) -> InvalidRequest:
    message = f"the body is not a valid form: {problem}"
    return invalid_request(message, code="invalid_form", expected=expected, received=received)


def find_pictures(files: list[tuple[str, UploadFile]], limit: int) -> list[BinaryIO]:
    """The pictures, of which the first is used. Raises `InvalidRequest` for other files; `BodyTooLarge`."""
    for name, _ in files:
        if name == "mask":
            raise no_mask()
        if not PICTURE.fullmatch(name):
            raise unsupported_part(ascii(name)[1:-1][:80], "only one file is used, the image", "no file")
    if files and (files[0][1].size or 0) > limit:
        raise BodyTooLarge(limit, "The picture")
    return [picture.file for _, picture in files]


def too_many_pictures(number: int) -> InvalidRequest:
    return unsupported_part("image", f"expected one picture, received {number}", "one picture")


def no_picture(expected: str) -> InvalidRequest:
    return InvalidRequest([issue_of("required", ("image",), Issue((), expected, None), missing=True)])


def no_mask(received: str = "a file") -> InvalidRequest:
    return unsupported_part("mask", "this model redraws the whole picture: leave the mask out", "no mask", received)


def unsupported_part(name: str, message: str, expected: str, received: str = "a file") -> InvalidRequest:
    return invalid_request(message, path=(name,), code="unsupported", expected=expected, received=received)


def sha256_of(file: BinaryIO) -> str:
    """Of the whole file, a piece at a time. Blocks."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest.hexdigest()


def parse_field(name: str, text: str) -> Any:
    """The value of a text field as JSON would have it: a number, true or false, or the text itself."""
    kind = PARAM_TYPES.get(ALIASES.get(name, name))
    if name in ("stream", "partial_images") or isinstance(kind, Integer | Number | Boolean):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if NUMBER.fullmatch(text):
            return int(text) if text.lstrip("-").isdigit() else float(text)
    return text
