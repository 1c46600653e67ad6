"""Where clients find a stored image: an address that nobody can guess and, by setting, one that is signed and expires.

A signature covers the image's name and the second at which it ends, as in signed addresses of object stores. Whoever
holds one can read the image until then, and no longer; the API gives a new one with each reply.
"""

import base64
import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from math import ceil, inf
from typing import Any

from server.errors import LinkRefused

PATH = "/files/"


class ImageLinks:
    """Makes and checks the addresses. `lifetime` is in seconds; None: no signature, valid as long as the image.

    The first of `secrets` signs; all are accepted, so that a new one can take the place of an old one.
    """

    def __init__(self, lifetime: float | None, secrets: Sequence[bytes], now: Callable[[], float]) -> None:
        self._lifetime = lifetime
        self._secrets = secrets
        self._now = now

    @property
    def expire(self) -> bool:
        """Whether addresses are valid for a time only, so that stored ones must be renewed."""
        return self._lifetime is not None

    def make(self, base_url: str, name: str) -> str:
        """The address of the image `name`."""
        url = f"{base_url}{PATH}{name}"
        if self._lifetime is None:
            return url
        until = str(ceil(self._now() + self._lifetime))
        return f"{url}?expires={until}&signature={sign(self._secrets[0], name, until)}"

    def check(self, name: str, query: Mapping[str, str]) -> float:
        """The seconds for which the address is still valid. Raises `LinkRefused` if it needs a signature and has none,
        or one that is wrong or over."""
        if self._lifetime is None:
            return inf
        until, offered = query.get("expires", ""), query.get("signature", "").encode("utf-8", "surrogateescape")
        right = [hmac.compare_digest(offered, sign(secret, name, until).encode()) for secret in self._secrets]
        if not any(right) or not until.isdecimal() or (left := int(until[:20]) - self._now()) < 0:
            raise LinkRefused
        return left

    def renew(self, reply: dict[str, Any]) -> dict[str, Any]:
        """A stored reply, with addresses that are valid from now on."""
        return reply | {
            part: [self._renew_item(item) for item in reply[part]] for part in ("images", "data") if part in reply
        }

    def _renew_item(self, item: dict[str, Any]) -> dict[str, Any]:
        base_url, path, rest = item.get("url", "").rpartition(PATH)
        if not path or base_url.startswith("data:"):
            return item
        return item | {"url": self.make(base_url, rest.partition("?")[0])}


def sign(secret: bytes, name: str, until: str) -> str:
    digest = hmac.digest(secret, f"{name}\n{until}".encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
