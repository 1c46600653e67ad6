"""How finished images get into replies: as URLs of stored files, or in base64 where the client asked for that.

A job's outcome never holds an image. Its images are always stored, whatever the form of the reply, and the outcome
names them; whoever asks for the reply gets it put together from the files, byte for byte the same each time.
"""

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any, Literal

import structlog

from pipelines.errors import Cancelled, Draining
from server.errors import StorageFailure
from server.images.encoding import EncodedImage
from server.images.stores.base import Store, StoredImage
from server.process.backoff import pauses
from server.schema import Body, GenerationReply, ImageItem
from server.state import AppState
from server.translation.translated_request import TranslatedRequest

Field = Literal["b64_json", "url"]

FIRST_PAUSE, MAX_PAUSE = 0.5, 5.0  # seconds between tries to store a job's image
log = structlog.get_logger("srpo")


class ImageDelivery:
    """Gives the images of one request the form that its client asked for, and stores those that need it.

    `durable`: they are a job's, which are all stored, as soon as the store takes them.
    """

    def __init__(
        self, state: AppState, translated: TranslatedRequest, body: Body, base_url: str, *, durable: bool
    ) -> None:
        """`base_url` is what the addresses of stored images begin with."""
        self.pictures: list[dict[str, Any]] = []  # of a job: what is left out of its reply
        self._state = state
        self._fields = inline_fields(translated, body)
        self._has_url = translated.response_format != "b64_json" and "url" not in self._fields
        self._base_url = base_url
        self._durable = durable
        self._cancelled = False

    def cancel(self) -> None:
        """Wait no longer for a store that takes nothing."""
        self._cancelled = True

    async def deliver(self, images: Sequence[EncodedImage]) -> list[ImageItem]:
        """Each image as the client asked for it: bare base64, a data URI, a URL of the stored file, or two of them.

        What the reply of a job would hold of its images is left to `pictures`. Raises what the store raises; for a
        job's images `Draining` or `Cancelled`, if the server or the job ends before they are stored.
        """
        delivered = await asyncio.gather(*map(self._deliver, images))
        if self._durable and self._fields:
            self.pictures = [{"name": stored.name, "fields": self._fields} for _, stored in delivered if stored]
        return [item for item, _ in delivered]

    async def _deliver(self, image: EncodedImage) -> tuple[ImageItem, StoredImage | None]:
        stored = await self._put(image) if self._durable or self._has_url else None
        item = describe_item(image, stored.url if stored and self._has_url else None)
        if self._fields and not self._durable:
            item = await self._state.threads.run("encoding", fill_item, item, self._fields, image.data)
        return item, stored

    async def _put(self, image: EncodedImage) -> StoredImage:
        waits = pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                return await self._state.threads.run("storing", self._state.store.put, image, self._base_url)
            except StorageFailure as error:
                if not self._durable:
                    raise
                if self._state.pool.status().state == "draining":
                    raise Draining from error
                if self._cancelled:
                    raise Cancelled from error
                pause = next(waits)
                log.error("image_not_stored", error=type(error).__name__, again_in=pause)
            await asyncio.sleep(pause)


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


def needs_files(pictures: Sequence[dict[str, Any]] | None, store: Store) -> bool:
    """Whether a reply is put together anew, which may read files or parse much."""
    return bool(pictures) or store.links.expire


def restore_reply(outcome: str, pictures: Sequence[dict[str, Any]] | None, store: Store) -> str:
    """The reply whose outcome was kept, with addresses that are valid now.

    `pictures` are, for each image with its bytes in the reply, `name` in the store and `fields` of the item. Raises
    `Gone` if one has expired, and what the store raises.
    """
    if not needs_files(pictures, store):
        return outcome
    stored = json.loads(outcome)
    reply = GenerationReply.model_validate(store.links.renew(stored) if store.links.expire else stored)
    if not pictures:
        return reply.text()
    files = [(picture["fields"], store.read(picture["name"]).data) for picture in pictures]
    items = [fill_item(item, *file) for item, file in zip(reply.images, files, strict=True)]
    return reply.model_copy(update={"images": items, "data": items}).text()
