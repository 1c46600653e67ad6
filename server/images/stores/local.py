"""Finished images in a local folder, under names that nobody can guess, until they expire.

A name is 128 random bits and a 64-bit signature of them. So an image that was deleted (410) differs from a name that
never existed (404), and no list of old names is needed. Files are written to a temporary name, synced, and renamed;
their time of change is when they were stored. No symbolic link inside the folder is followed.
"""

import base64
import errno
import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from server.errors import Gone, NotFound, StorageFull
from server.images.encoding import CONTENT_TYPES, EncodedImage
from server.images.links import ImageLinks
from weights.durable_file import write_durably

RANDOM_BYTES, SIGNATURE_BYTES = 16, 8
NAME = re.compile(r"([A-Za-z0-9_-]{32})\.(jpeg|png|webp)")
TEMPORARY = ".partial"
SWEEP_EVERY = 60.0  # seconds
LINKS = (errno.ELOOP, errno.EMLINK)  # what systems say of a link that must not be followed


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


class LocalStore:
    """Images under `root/images`. Safe to use from several threads.

    `now` is the clock by which they age, in seconds; `link_lifetime` and `link_secrets` are those of `links`.
    """

    def __init__(
        self,
        root: Path,
        expire: float,
        cap: int,
        now: Callable[[], float] = time.time,
        link_lifetime: float | None = None,
        link_secrets: Sequence[str] = (),
    ) -> None:
        self._root = root / "images"
        self._root.mkdir(parents=True, exist_ok=True)
        self._expire = expire
        self.cap = cap  # bytes
        self._now = now
        self._secret = self._load_secret(root / "images.key")
        own = hmac.digest(self._secret, b"links", hashlib.sha256)
        self.links = ImageLinks(link_lifetime, [secret.encode() for secret in link_secrets] or [own], now)
        self.sweep(leftovers=True)

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return self._size

    def put(self, image: EncodedImage, base_url: str) -> StoredImage:
        """Store an image. Its bytes are on the disk when this returns. Raises `StorageFull`."""
        token = secrets.token_bytes(RANDOM_BYTES)
        name = base64.urlsafe_b64encode(token + self._sign(token)).decode() + "." + image.format
        temporary = name + TEMPORARY
        try:
            (self._root / name[:2]).mkdir(exist_ok=True)
            with self._folder(name) as folder:
                try:
                    self._write(folder, temporary, image.data)
                    os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                    os.fsync(folder)
                except OSError:
                    remove(folder, temporary)
                    raise
        except OSError as error:
            raise StorageFull from error
        self._size += len(image.data)
        if self._size > self.cap or time.monotonic() > self._next_sweep:
            self.sweep()
        return StoredImage(name, self.links.make(base_url, name))

    def read(self, name: str) -> FoundImage:
        """An image by its name. Raises `NotFound` or `Gone`."""
        match = NAME.fullmatch(name)
        raw = base64.urlsafe_b64decode(match[1]) if match else b""
        if not match or not hmac.compare_digest(raw[RANDOM_BYTES:], self._sign(raw[:RANDOM_BYTES])):
            raise NotFound("There is no such image.")
        try:
            with self._folder(name) as folder:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            with os.fdopen(file, "rb") as opened:
                info = os.fstat(file)
                left = info.st_mtime + self._expire - self._now()
                if left <= 0 or not stat.S_ISREG(info.st_mode):
                    raise Gone
                return FoundImage(opened.read(), CONTENT_TYPES[match[2]], left)
        except (FileNotFoundError, NotADirectoryError):
            raise Gone from None
        except OSError as error:
            if error.errno in LINKS:
                raise Gone from None
            raise

    def sweep(self, *, leftovers: bool = False) -> None:
        """Delete expired images, then the oldest until the rest fits the cap; `leftovers`: also half-written ones."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        oldest_allowed = self._now() - self._expire
        for written, size, name in files:
            unfinished = name.endswith(TEMPORARY)
            if (unfinished and leftovers) or (not unfinished and (written < oldest_allowed or total > self.cap)):
                with self._folder(name) as folder:
                    remove(folder, name)
                total -= size
        self._size = total
        self._next_sweep = time.monotonic() + SWEEP_EVERY

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(written, bytes, name) of every file. Links and what they lead to are not ours."""
        for folder in os.scandir(self._root):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder):
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(info.st_mode) and entry.name[:2] == folder.name:
                    yield info.st_mtime, info.st_size, entry.name

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """A descriptor of the folder that an image of this name is in."""
        folder = os.open(self._root / name[:2], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            yield folder
        finally:
            os.close(folder)

    def _write(self, folder: int, name: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(data)
            file.flush()
            now = self._now()
            os.utime(file.fileno(), (now, now))
            os.fsync(file.fileno())

    def _sign(self, token: bytes) -> bytes:
        return hmac.digest(self._secret, token, hashlib.sha256)[:SIGNATURE_BYTES]

    def _load_secret(self, path: Path) -> bytes:
        if not path.exists():
            write_durably(path, secrets.token_bytes(32))
        return path.read_bytes()


def remove(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
