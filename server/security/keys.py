"""API keys: which exist, and whether a request has one. Only hashes are stored, and compared in constant time.

Keys have at least 128 random bits when `srpo keys` makes them, so a plain SHA-256 needs no salt and no slow hash.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from server.errors import Unauthorized

LINE = re.compile(r"(?:(?P<name>\S+)\s+)?sha256:(?P<hash>[0-9a-f]{64})")


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key() -> tuple[str, str]:
    """A new key, and its line for the key file."""
    key = "sk-" + secrets.token_urlsafe(32)
    return key, f"sha256:{hash_key(key)}"


class KeyRing:
    """The keys that clients may use. Without any key, every request is accepted."""

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        self._hashes = [hash_key(key) for key in keys] + (read_hashes(file) if file else [])

    def authenticate(self, key: str | None) -> str:
        """Returns the key's hash, "" if no keys are needed. Raises `Unauthorized` if it is missing or unknown."""
        if not self._hashes:
            return ""
        offered = hash_key(key or "")
        known = [hmac.compare_digest(offered, held) for held in self._hashes]  # all of them: no early exit
        if key is None or not any(known):
            raise Unauthorized
        return offered


def read_hashes(file: Path) -> list[str]:
    """The hashes of a key file: lines of `[name] sha256:HEX`; blank lines and `#` comments are skipped."""
    hashes = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"{file}, line {number}: expected `name sha256:HEX` as `srpo keys` prints it")
        hashes.append(match["hash"])
    if not hashes:
        raise ValueError(f"{file} holds no keys: the server would be open")
    return hashes
