"""Finished images in a local folder, under names that nobody can guess, until they expire.

A name is 128 random bits and a 64-bit signature of them. So an image that was deleted (410) differs from a name that
never existed (404), and no list of old names is needed. Files are written to a temporary name, synced, and renamed.
"""

import base64
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.errors import Gone, NotFound, StorageFull
from server.images.encoding import CONTENT_TYPES, EncodedImage

RANDOM_BYTES, SIGNATURE_BYTES = 16, 8
NAME = re.compile(r"([A-Za-z0-9_-]{32})\.(jpeg|png|webp)")
TEMPORARY = ".partial"
SWEEP_EVERY = 60.0  # seconds


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in the store: its file name, and the URL for clients."""

    name: str
    url: str


class LocalStore:
    """Images under `root/images`. Safe to use from several threads."""

    def __init__(self, root: Path, expire: float, cap: int) -> None:
        self._root = root / "images"
        self._root.mkdir(parents=True, exist_ok=True)
        self._expire = expire
        self._cap = cap
        self._secret = self._load_secret(root / "images.key")
        for leftover in self._root.glob(f"*/*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)
        self.sweep()

    def put(self, image: EncodedImage, base_url: str) -> StoredImage:
        """Store an image. Its bytes are on the disk when this returns. Raises `StorageFull`."""
        token = secrets.token_bytes(RANDOM_BYTES)
        name = base64.urlsafe_b64encode(token + self._sign(token)).decode() + "." + image.format
        path = self._path(name)
        temporary = path.with_name(path.name + TEMPORARY)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(image.data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageFull from error
        self._size += len(image.data)
        if self._size > self._cap or time.monotonic() > self._next_sweep:
            self.sweep()
        return StoredImage(name, f"{base_url}/files/{name}")

    def find(self, name: str) -> tuple[Path, str, float]:
        """The file, its content type, and the seconds until it expires. Raises `NotFound` or `Gone`."""
        match = NAME.fullmatch(name)
        raw = base64.urlsafe_b64decode(match[1]) if match else b""
        if not match or not hmac.compare_digest(raw[RANDOM_BYTES:], self._sign(raw[:RANDOM_BYTES])):
            raise NotFound("There is no such image.")
        path = self._path(name)
        try:
            left = path.stat().st_mtime + self._expire - time.time()
        except FileNotFoundError:
            raise Gone from None
        if left <= 0:
            raise Gone
        return path, CONTENT_TYPES[match[2]], left

    def sweep(self) -> None:
        """Delete expired images, then the oldest until the rest fits the cap."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        oldest_allowed = time.time() - self._expire
        for written, size, path in files:
            if written >= oldest_allowed and total <= self._cap:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._size = total
        self._next_sweep = time.monotonic() + SWEEP_EVERY

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(written, bytes, path) of every image."""
        for path in self._root.glob("*/*"):
            try:
                info = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix != TEMPORARY:
                yield info.st_mtime, info.st_size, path

    def _path(self, name: str) -> Path:
        return self._root / name[:2] / name

    def _sign(self, token: bytes) -> bytes:
        return hmac.digest(self._secret, token, hashlib.sha256)[:SIGNATURE_BYTES]

    def _load_secret(self, path: Path) -> bytes:
        if not path.exists():
            fresh = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
            fresh.touch(mode=0o600)
            fresh.write_bytes(secrets.token_bytes(32))
            fresh.rename(path)
        return path.read_bytes()
