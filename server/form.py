"""From the bytes of a multipart form to fields and one picture: how OpenAI's `images.edit` sends a request."""

import logging
import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from pipelines.kinds import Flag, Issue, Number, Whole
from server.asked import KEPT_APART
from server.body import receive, wrong
from server.errors import InvalidRequest
from server.schema import issue_of
from server.spellings import ALIASES, IMAGE_TO_IMAGE, KINDS

PICTURE = re.compile(r"image(\[\d*\])?")  # as a member of a list it is `image[]`
NUMBER = re.compile(r"-?\d{1,20}(\.\d{1,20})?", re.ASCII)
MAX_FIELDS = 100
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # its warnings quote the body


class Form(MultiPartParser):
    spool_max_size = 2**62  # the body is in memory already, and stays off the disk


async def read_form(request: Request, limit: int, seconds: float) -> tuple[dict[str, Any], bytes | None]:
    """The fields, numbers and switches as such, and the picture. Raises `InvalidRequest` and as `read_object` does."""
    raw = await receive(request, "multipart/form-data", limit, seconds)

    async def whole() -> AsyncGenerator[bytes, None]:
        yield raw

    try:
        form = await Form(
            request.headers, whole(), max_files=MAX_FIELDS, max_fields=MAX_FIELDS, max_part_size=limit
        ).parse()
    except MultiPartException as error:
        problem = f"the body is not a valid form: {error.message}"
        raise wrong(problem, code="invalid_form", expected="a multipart form", received="a broken one") from error
    files = [(name, await part.read()) for name, part in form.multi_items() if isinstance(part, UploadFile)]
    fields = {name: typed(name, part) for name, part in form.multi_items() if isinstance(part, str)}
    await form.close()
    model = fields.get("model")
    if isinstance(model, str) and not model.endswith(IMAGE_TO_IMAGE):
        fields["model"] = model + IMAGE_TO_IMAGE  # an edit begins at a picture, whichever name it is asked by
    picture = one_picture(files)
    if picture is not None:
        fields["image_url"] = KEPT_APART
    elif not {"image", "image_url"} & set(fields):
        raise InvalidRequest(
            [issue_of("required", ("image",), Issue((), "a PNG, JPEG or WebP file", None), missing=True)]
        )
    return fields, picture


def one_picture(files: list[tuple[str, bytes]]) -> bytes | None:
    """The picture to begin with. Raises `InvalidRequest` for a second one, and for what is not used."""
    for name, _ in files:
        if name == "mask":
            raise unsupported(name, "this model redraws the whole picture: leave the mask out", "no mask")
        if not PICTURE.fullmatch(name):
            raise unsupported(ascii(name)[1:-1][:80], "only one file is used, the image", "no file")
    if len(files) > 1:
        raise unsupported("image", f"expected one picture, received {len(files)}", "one picture")
    return files[0][1] if files else None


def unsupported(name: str, message: str, expected: str) -> InvalidRequest:
    return wrong(message, path=(name,), code="unsupported", expected=expected, received="a file")


def typed(name: str, text: str) -> Any:
    """What a form can only say in text, as JSON would have said it."""
    kind = KINDS.get(ALIASES.get(name, name))
    if name in ("stream", "partial_images") or isinstance(kind, Whole | Number | Flag):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if NUMBER.fullmatch(text):
            return float(text) if "." in text else int(text)
    return text
