"""Images in a local folder. Files are written to a temporary name, synced, and renamed; their time of change is when
they were stored. No symbolic link inside the folder is followed.
"""

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from server.errors import Gone, StorageFailure, StorageFull, StoreUnavailable
from server.images.encoding import EncodedImage
from server.images.stores.base import (
    PROBE_SIZE,
    SECRET_BYTES,
    SECRET_NAME,
    FoundImage,
    ImageNames,
    Retention,
    StoredImage,
    make_links,
)
from weights.durable_file import create_durably, write_synced

TEMPORARY = ".partial"
SWEEP_EVERY = 60.0  # seconds
FOLDER_LETTERS = 2  # an image is in the folder of its name's first ones
LINKS = (errno.ELOOP, errno.EMLINK)  # what systems say of a link that must not be followed
log = structlog.get_logger("srpo")


class LocalStore:
    """A `Store`: images under `root/images`.

    `now` is the clock by which they age, in seconds; `link_lifetime` and `link_secrets` are those of `links`.
    """

    origin: str | None = None

    def __init__(
        self,
        root: Path,
        retention: Retention,
        now: Callable[[], float] = time.time,
        link_lifetime: float | None = None,
        link_secrets: Sequence[str] = (),
    ) -> None:
        self._root = root / "images"
        self._root.mkdir(parents=True, exist_ok=True)
        self._expire = retention.expire
        self.cap = retention.cap
        self._now = now
        self.failure: StorageFailure | None = None
        secret = load_secret(root / SECRET_NAME)
        self._names = ImageNames(secret)
        self.links = make_links(link_lifetime, link_secrets, secret, now)
        self._failed_to_delete = False  # in the last sweep
        self._unlisted: set[str] = set()  # folders that could not be listed, which is said once
        self.sweep(leftovers=True)

    @property
    def size(self) -> int:
        return self._size

    @property
    def place(self) -> str:
        return str(self._root.absolute())

    def put(self, image: EncodedImage, base_url: str) -> StoredImage:
        """Store an image. Its bytes are on the disk when this returns. Raises `StorageFull`."""
        name = self._names.make(image.format)
        temporary = name + TEMPORARY
        try:
            self._make_root()
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
            if self.failure is None:  # said once, until it can be written again
                log.error("image_not_written", folder=str(self._root), error=error.strerror, errno=error.errno)
            self.failure = StorageFull()
            raise self.failure from error
        self.failure = None
        self._size += len(image.data)
        self._sweep_if_due()
        return StoredImage(name, self.links.make(base_url, name))

    def read(self, name: str) -> FoundImage:
        """An image by its name. Raises `NotFound`, `Gone` or `StoreUnavailable`."""
        content_type = self._names.check(name)
        try:
            with self._folder(name) as folder:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            with os.fdopen(file, "rb") as opened:
                info = os.fstat(file)
                left = info.st_mtime + self._expire - self._now()
                if left <= 0 or not stat.S_ISREG(info.st_mode):
                    raise Gone
                return FoundImage(opened.read(), content_type, left)
        except (FileNotFoundError, NotADirectoryError):
            raise Gone from None
        except OSError as error:
            if error.errno in LINKS:
                raise Gone from None
            log.error("image_not_read", error=error.strerror)
            raise StoreUnavailable from error

    def sign_url(self, name: str, method: str, seconds: float) -> str | None:  # noqa: ARG002 - a `Store`
        return None

    def maintain(self) -> None:
        self._sweep_if_due()
        if self.failure is not None:
            self._try_disk()

    def _make_root(self) -> None:
        """The folder of images, where somebody has deleted it. The data folder is not made: its disk may be away."""
        self._root.mkdir(0o700, exist_ok=True)

    def _try_disk(self) -> None:
        """Whether something as large as an image can be written again. Raises `StorageFull`."""
        probe = self._root / f"probe{TEMPORARY}"
        try:
            self._make_root()
            write_synced(probe, bytes(PROBE_SIZE))
        except OSError as error:
            raise StorageFull from error
        finally:
            with suppress(OSError):  # what hinders the writing may hinder this, too
                probe.unlink()
        self.failure = None

    def _sweep_if_due(self) -> None:
        if self._size > self.cap or time.monotonic() > self._next_sweep:
            try:
                self.sweep()
            except OSError as error:  # what was stored is stored
                self._note_unlisted("", error)

    def sweep(self, *, leftovers: bool = False) -> None:
        """Delete expired images, then the oldest until the rest fits the cap; `leftovers`: also half-written ones."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        oldest_allowed = self._now() - self._expire
        failed: OSError | None = None
        for written, size, name in files:
            unfinished = name.endswith(TEMPORARY)
            if (unfinished and leftovers) or (not unfinished and (written < oldest_allowed or total > self.cap)):
                try:
                    with self._folder(name) as folder:
                        remove(folder, name)
                except OSError as error:  # another user's, or the disk's: no reason to keep no others
                    failed = error
                total -= size
        if failed is not None and not self._failed_to_delete:
            log.warning("image_not_deleted", error=failed.strerror)
        self._failed_to_delete = failed is not None
        self._size = total
        self._next_sweep = time.monotonic() + SWEEP_EVERY

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(written, bytes, name) of every file. Links and what they lead to are not ours."""
        for folder in os.scandir(self._root):
            if len(folder.name) != FOLDER_LETTERS or not folder.is_dir(follow_symlinks=False):
                continue
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                self._note_unlisted(folder.name, error)
                continue
            for entry in entries:
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError:  # it was deleted, or is the disk's
                    continue
                if stat.S_ISREG(info.st_mode) and entry.name[:2] == folder.name:
                    yield info.st_mtime, info.st_size, entry.name

    def _note_unlisted(self, folder: str, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) and folder not in self._unlisted:
            self._unlisted.add(folder)
            log.warning("images_not_listed", folder=folder, error=error.strerror)

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


def load_secret(path: Path) -> bytes:
    if not path.exists():
        create_durably(path, secrets.token_bytes(SECRET_BYTES))
    return path.read_bytes()


def remove(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
