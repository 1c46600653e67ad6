"""What comes to `/v1/images/edits`: a form, or JSON with the pictures' addresses, as OpenAI's API takes both.

In JSON a picture is an address or a data URI: alone, or as `image_url` or `url` of an object, in `image` or in the list
`images`.
"""

from typing import Any

from starlette.requests import Request

from server.security.limits import Upload
from server.state import AppState
from server.translation.aliases import lift_extra_body
from server.transport.json_body import read_object
from server.transport.multipart import Form, no_mask, no_picture, read_form, unsupported_part

PICTURES = ("image", "images", "image[]")
ADDRESSES = ("image_url", "url")  # in a picture's object


async def read_edit(request: Request, state: AppState, upload: Upload) -> Form:
    """The fields of an edit and its picture: an open file, or an address in the field `image_url`.

    Raises as `read_form` and `read_object` do.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        return take_addresses(lift_extra_body(await read_object(request, state, upload)))
    return await read_form(request, state.settings, upload)


def take_addresses(fields: dict[str, Any]) -> Form:
    """The first picture's address becomes `image_url`. Raises `InvalidRequest` where there is none, or a mask."""
    if fields.get("mask") is not None:
        raise no_mask("a mask")
    listed = [part for name in PICTURES for part in as_list(fields.pop(name, None))]
    pictures = [*as_list(fields.get("image_url")), *listed]
    if not pictures:
        raise no_picture("the address or data URI of a picture")
    fields["image_url"] = address_of(pictures[0])
    return Form(fields, None, [f"image.{number}" for number in range(1, len(pictures))])


def as_list(value: Any) -> list[Any]:
    """None is empty, and a value alone is a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def address_of(part: Any) -> Any:
    """The address in a picture's object; what is no address is left to be refused as an `image_url`."""
    while isinstance(part, dict):
        address = next((part[name] for name in ADDRESSES if part.get(name) is not None), None)
        if address is None and part.get("file_id") is not None:
            raise unsupported_part(
                "image", "no files are kept here: send the picture itself", "an address", "a file_id"
            )
        part = address
    return part
