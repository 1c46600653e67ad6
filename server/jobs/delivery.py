"""How finished images get into replies: as URLs of stored files, or in base64 where the client asked for that.

A job's outcome never holds an image. Its images are always stored, whatever the form of the reply, and the outcome
names them; whoever asks for the reply gets it put together from the files, byte for byte the same each time.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any, Literal

from server.aliases import TranslatedRequest
from server.images.encoding import EncodedImage
from server.images.stores.base import Store
from server.schema import Body, GenerationReply, ImageItem

Field = Literal["b64_json", "url"]


def inline_fields(translated: TranslatedRequest, body: Body) -> tuple[Field, ...]:
    """The fields of an item that hold the image itself."""
    form = translated.response_format
    bare: tuple[Field, ...] = ("b64_json",) if form in ("b64_json", "both") else ()
    return (*bare, "url") if form != "b64_json" and body.sync_mode else bare


def describe_item(image: EncodedImage, url: str | None) -> ImageItem:
    """An image without its bytes."""
    place = {} if url is None else {"url": url}
    return ImageItem(width=image.width, height=image.height, content_type=image.content_type, **place)


def fill_item(item: ImageItem, fields: Sequence[str], data: bytes) -> ImageItem:
    """The item with the image's bytes in these fields."""
    text = base64.b64encode(data).decode("ascii")
    forms = {"b64_json": text, "url": f"data:{item.content_type};base64,{text}"}
    return item.model_copy(update={name: forms[name] for name in fields})


def restore_reply(outcome: str, pictures: Sequence[dict[str, Any]] | None, store: Store) -> str:
    """The reply whose outcome was kept, with addresses that are valid now.

    `pictures` are, for each image with its bytes in the reply, `name` in the store and `fields` of the item. Raises
    `Gone` if one has expired, and what the store raises.
    """
    if not pictures and not store.links.expire:
        return outcome
    stored = json.loads(outcome)
    reply = GenerationReply.model_validate(store.links.renew(stored) if store.links.expire else stored)
    if not pictures:
        return reply.text()
    files = [(picture["fields"], store.read(picture["name"]).data) for picture in pictures]
    items = [fill_item(item, *file) for item, file in zip(reply.images, files, strict=True)]
    return reply.model_copy(update={"images": items, "data": items}).text()
