"""What all stores have in common: names that nobody can guess, and what is said of a stored image.

A name is 128 random bits and a 64-bit signature of them. So an image that was deleted (410) differs from a name that
never existed (404), and no list of old names is needed. Stores that share a secret know each other's names.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.image_formats import IMAGE_FORMATS
from server.errors import NotFound, StorageFailure
from server.images.encoding import EncodedImage
from server.images.links import ImageLinks

RANDOM_BYTES, SIGNATURE_BYTES, SECRET_BYTES = 16, 8, 32
PROBE_SIZE = 2**20  # bytes of what is written to see whether an image could be
NAME = re.compile(rf"([A-Za-z0-9_-]{{32}})\.({'|'.join(IMAGE_FORMATS)})")
SECRET_NAME = "images.key"  # noqa: S105 - the name of the file, beside the images


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the store: its file name, and the URL for clients."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image out of the store, and the seconds until it expires."""

    data: bytes
    content_type: str
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Retention:
    """How long images are kept, and how many: seconds, and bytes of all of them."""

    expire: float
    cap: int


class Store(Protocol):
    """A store of images. Safe to use from several threads."""

    links: ImageLinks
    origin: str | None  # of the URLs that `sign_url` makes
    cap: int  # bytes
    failure: StorageFailure | None  # of the last try to write, until one goes well

    @property
    def size(self) -> int:
        """Bytes of all images, as far as this server knows."""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    def put(self, image: EncodedImage, base_url: str) -> StoredImage:
        """Store an image under a new name; it is durable when this returns. Raises a `StorageFailure`."""

    def read(self, name: str) -> FoundImage:
        """An image by its name. Raises `NotFound`, `Gone` or a `StorageFailure`."""

    def sign_url(self, name: str, method: str, seconds: float) -> str | None:
        """Where clients get the image itself with `method`, for `seconds` and a few minutes at most.

        None: only from this server. Raises as `read` does.
        """

    def maintain(self) -> None:
        """What is to be done every few seconds: delete what has expired or is too much, look whether all is well."""


class ImageNames:
    """Makes and checks names, with a secret of the store's."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def make(self, format: str) -> str:
        token = secrets.token_bytes(RANDOM_BYTES)
        return base64.urlsafe_b64encode(token + self._sign(token)).decode() + "." + format

    def check(self, name: str) -> str:
        """The content type of an image of this name. Raises `NotFound` if no image ever had it."""
        match = NAME.fullmatch(name)
        raw = base64.urlsafe_b64decode(match[1]) if match else b""
        if not match or not hmac.compare_digest(raw[RANDOM_BYTES:], self._sign(raw[:RANDOM_BYTES])):
            raise NotFound("There is no such image.")
        return IMAGE_FORMATS[match[2]].content_type

    def _sign(self, token: bytes) -> bytes:
        return hmac.digest(self._secret, token, hashlib.sha256)[:SIGNATURE_BYTES]


def make_links(lifetime: float | None, chosen: Sequence[str], secret: bytes, now: Callable[[], float]) -> ImageLinks:
    """The addresses of a store's images, signed with the `chosen` secrets or with one that follows from its own."""
    own = hmac.digest(secret, b"links", hashlib.sha256)
    return ImageLinks(lifetime, [text.encode() for text in chosen] or [own], now)
