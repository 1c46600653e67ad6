"""Which API keys exist, and whether a request has one. Only hashes are kept, and compared in constant time.

Keys come from the settings (`SRPO_API_KEYS`, a file of hashes), which may draw and nothing else, and from the database,
each with scopes and quotas of its own. Those of the database are found by their public prefix.
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from server.errors import Unauthorized
from server.security.callers import Caller
from server.security.store import StoredKeys, hash_key, is_over, prefix_of

LINE = re.compile(r"(?:(?P<name>\S+)\s+)?sha256:(?P<hash>[0-9a-f]{64})")
NOBODY = Caller("", frozenset({"generate", "metrics"}))  # who asks a server without keys: everybody on the machine


def new_key() -> tuple[str, str]:
    """A new key, and its line for the key file."""
    key = "sk-" + secrets.token_urlsafe(32)
    return key, f"sha256:{hash_key(key)}"


class KeyRing:
    """The keys that clients may use. Without any key, and unless one is `required`, every request is accepted.

    A database that has ever had a key has keys: revoking the last one opens nothing.
    """

    def __init__(
        self,
        keys: Iterable[str] = (),
        file: Path | None = None,
        *,
        required: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._fixed = [hash_key(key) for key in keys] + (read_hashes(file) if file else [])
        self._required = required or bool(self._fixed)
        self._stored = StoredKeys({}, any=False)
        self._now = now

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return self._required or self._stored.any

    def replace(self, stored: StoredKeys) -> None:
        """From now on the database's keys are these."""
        self._stored = stored

    def authenticate(self, key: str | None) -> Caller:
        """Whose request it is. Raises `Unauthorized` if the key is missing, unknown or over."""
        if not self.needed:
            return NOBODY
        offered = hash_key(key or "")
        stored = self._stored.secrets.get(prefix_of(key or ""))
        if stored and hmac.compare_digest(offered, stored.hash) and not is_over(stored.expires, self._now()):
            return stored.caller
        known = [hmac.compare_digest(offered, held) for held in self._fixed]  # all of them: no early exit
        if key is None or not any(known):
            raise Unauthorized
        return Caller(offered, frozenset({"generate"}))


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
