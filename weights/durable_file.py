"""Small files that are whole or not there, also after a loss of power."""

import os
import threading
from pathlib import Path

PRIVATE, ORDINARY = 0o600, 0o666  # an ordinary file is open to whom the umask says


def write_durably(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Put a file with these bytes, closed to other users unless `mode` says otherwise, in the place of `path`.

    They are on the disk when this returns: the content is synced before it gets its name, the folder after it. Two
    writers of one file at a time are the caller's to keep apart. Raises `OSError`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write_synced(temporary, data, mode)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_durably(path: Path, data: bytes) -> None:
    """As `write_durably`, but a file that is there stays, also if another writer makes it in the same moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        write_synced(temporary, data)
        link_or_replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def link_or_replace(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: there the last writer wins
        temporary.replace(path)


def append_durably(path: Path, data: bytes) -> None:
    """Add these bytes to a file, which need not exist. They are on the disk when this returns. Raises `OSError`."""
    new = not path.exists()
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def write_synced(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
