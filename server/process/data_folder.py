"""The data folder: of one server at a time, closed to other users, with a clock that no change of the date moves."""

import json
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import structlog
from filelock import FileLock, Timeout

from weights.durable_file import write_durably

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CLOCK = "clock.json"
OURS = ("images", "compiled", "images.key", "engine.json", "server.lock", CLOCK, "jobs.sqlite3*")
log = structlog.get_logger("srpo")


def make_private(folder: Path) -> None:
    """From here on this process and its children make files that only this user can read.

    What an earlier version left in `folder` is closed too; the folder itself is, where it is made here.
    """
    os.umask(0o077)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (path for pattern in OURS for path in folder.glob(pattern)):
        if not path.is_symlink() and path.stat().st_uid == os.geteuid():
            path.chmod(0o700 if path.is_dir() else 0o600)


def lock_data_folder(folder: Path) -> AbstractContextManager[object]:
    """Lock the folder until the context ends: two servers on one would both run its unfinished jobs.

    The lock ends with this process, however it ends. Raises `OSError` if another server holds it. A network file
    system without locks is only warned about.
    """
    path = folder / "server.lock"
    lock = FileLock(path, blocking=False, fallback_to_soft=False)  # a soft lock would outlive a killed server
    held: AbstractContextManager[object] = nullcontext()
    try:
        held = lock.acquire()
    except Timeout:
        owner = path.read_text().strip()
        raise OSError(
            f"another server (pid {owner}) uses the data folder {folder}. Choose another one with --data-dir"
        ) from None
    except OSError as error:
        advice = "see that no other server uses it"
        log.warning("data_dir_not_locked", folder=str(folder), reason=error.strerror, advice=advice)
    path.write_text(f"{os.getpid()}\n")
    return held


class FolderClock:
    """Seconds since 1970 by which files and jobs in a data folder age.

    Until the machine starts anew it goes on from where it was, also over restarts of the server: a date that is set a
    day ahead expires nothing. After that it is the machine's date again, but never earlier than it was.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / CLOCK
        boot, self._offset = boot_id(), time.time() - seconds_since_boot()
        try:
            saved = json.loads(self._file.read_text())
            if boot and saved["boot"] == boot:
                self._offset = float(saved["offset"])
            else:
                self._offset = max(self._offset, float(saved["latest"]) - seconds_since_boot())
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a new folder, or a damaged file: the machine's date
        self._boot = boot
        self.save()

    def __call__(self) -> float:
        return self._offset + seconds_since_boot()

    def save(self) -> None:
        """Write down how late it is. A disk that is full does not stop the clock."""
        state = {"boot": self._boot, "offset": self._offset, "latest": self()}
        try:
            write_durably(self._file, json.dumps(state).encode())
        except OSError as error:
            log.warning("clock_not_kept", file=str(self._file), reason=error.strerror)


def seconds_since_boot() -> float:
    """Time asleep counts, where the system tells it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def boot_id() -> str:
    """Another one each time the machine starts; empty where the system has none."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
