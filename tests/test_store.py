"""What is a local store's own, on a real folder: leftovers, full disks, links, the clock. The rest: test_stores.py."""

import itertools
import os
import shutil
import string
import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.errors import Gone, StorageFull, StoreUnavailable
from server.images.encoding import EncodedImage
from server.images.stores import local
from server.images.stores.base import Retention
from server.images.stores.local import LocalStore
from server.process.data_folder import FolderClock

BASE = "http://127.0.0.1:8000"


def image(size: int = 1000, fill: bytes = b"x") -> EncodedImage:
    return EncodedImage(fill * size, "png", 1, 1)


def store(tmp_path: Path, expire: float = 100.0, cap: int = 10**6) -> LocalStore:
    return LocalStore(tmp_path, Retention(expire, cap))


def path_of(tmp_path: Path, name: str) -> Path:
    return tmp_path / "images" / name[:2] / name


def test_leftovers_of_a_crash_are_cleared_and_never_served(tmp_path: Path) -> None:
    images = store(tmp_path)
    path = path_of(tmp_path, images.put(image(), BASE).name)
    leftover = path.with_name(path.name + ".partial")
    leftover.write_bytes(b"half")
    store(tmp_path)
    assert not leftover.exists()
    assert path.exists()


def test_a_full_disk_is_an_error_of_its_own_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = store(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        images.put(image(), BASE)
    assert [path for path in (tmp_path / "images").rglob("*") if path.is_file()] == []


def test_a_folder_of_images_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    images = store(tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "images")
    name = images.put(image(), BASE).name
    assert images.read(name).data == image().data
    assert (tmp_path / "data" / "images").stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_written_is_named_in_the_log_and_tried_until_it_can(tmp_path: Path) -> None:
    images = store(tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "away")
    with capture_logs() as logged:
        for _ in range(2):
            with pytest.raises(StorageFull):
                images.put(image(), BASE)
    (entry,) = logged
    assert entry["folder"] == str(tmp_path / "data" / "images")
    assert entry["error"] == "No such file or directory"
    (tmp_path / "away").rename(tmp_path / "data")
    images.maintain()
    assert images.failure is None


def test_folders_that_vanish_or_cannot_be_listed_keep_nobody_from_storing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image was on the disk, and its job failed."""
    images = store(tmp_path, cap=1500)
    vanishing, refused, foreign = (tmp_path / "images" / name for name in ("a+", "b+", "lost+found"))
    for folder in (vanishing, refused, foreign):
        folder.mkdir()
    scan = os.scandir

    def scan_badly(path: Any) -> Any:
        name = Path(path).name
        if name in (refused.name, foreign.name):
            raise PermissionError(13, "Permission denied")
        if name == vanishing.name:
            vanishing.rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_badly)
    with capture_logs() as entries:
        for _ in range(4):
            name = images.put(image(), BASE).name
            assert images.read(name).data == image().data
    assert [(entry["event"], entry["folder"]) for entry in entries] == [("images_not_listed", refused.name)]


def test_an_image_that_the_disk_does_not_give_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = store(tmp_path)
    name = images.put(image(), BASE).name

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fstat", fail)
        with pytest.raises(StoreUnavailable):
            images.read(name)
    assert images.read(name).data == image().data


def test_an_image_that_cannot_be_deleted_keeps_nobody_from_storing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = store(tmp_path, cap=1500)
    stuck = images.put(image(), BASE).name
    plain = local.remove

    def remove(folder: int, name: str) -> None:
        if name == stuck:
            raise PermissionError(1, "Operation not permitted")
        plain(folder, name)

    monkeypatch.setattr(local, "remove", remove)
    with capture_logs() as lines:
        names = [images.put(image(), BASE).name for _ in range(3)]
    assert [line["event"] for line in lines] == ["image_not_deleted"]
    assert path_of(tmp_path, stuck).exists()
    assert sum(path_of(tmp_path, name).exists() for name in names) <= 1  # the cap holds for the others


def test_a_link_in_the_store_is_neither_read_nor_written_nor_swept(tmp_path: Path) -> None:
    images, elsewhere = store(tmp_path, expire=1.0), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    names = [images.put(image(), BASE).name for _ in range(2)]
    path_of(tmp_path, names[0]).unlink()
    path_of(tmp_path, names[0]).symlink_to(elsewhere / "secret")
    folder = path_of(tmp_path, names[1]).parent
    copy = elsewhere / names[1]
    copy.write_bytes(b"planted")
    shutil.rmtree(folder)
    folder.symlink_to(elsewhere)
    for name in names:
        with pytest.raises(Gone):
            images.read(name)
    old = time.time() - 1000
    os.utime(copy, (old, old))
    images.sweep()
    assert copy.read_bytes() == b"planted"
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    letters = string.ascii_letters + string.digits + "-_"
    for first, second in itertools.product(letters, letters):  # whichever folder a new image comes to
        (tmp_path / "images" / f"{first}{second}").symlink_to(elsewhere)
    with pytest.raises(StorageFull):
        images.put(image(), BASE)
    assert {path.name for path in elsewhere.iterdir()} == {"secret", copy.name}


@pytest.mark.parametrize("jump", [25 * 3600.0, -25 * 3600.0])
def test_a_date_that_is_set_anew_expires_nothing_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """The clock is set while the server runs, or while it is restarted. Ages go on as if nothing had happened."""
    slept = 0.0
    since_boot = time.clock_gettime
    monkeypatch.setattr("server.process.data_folder.time.clock_gettime", lambda clock: since_boot(clock) + slept)
    images = LocalStore(tmp_path, Retention(3600, 10**6), FolderClock(tmp_path))
    name = images.put(image(), BASE).name
    wall = time.time
    monkeypatch.setattr("time.time", lambda: wall() + slept + jump)
    reopened = LocalStore(tmp_path, Retention(3600, 10**6), FolderClock(tmp_path))
    for each in (images, reopened):
        each.sweep()
        assert 3000 < each.read(name).seconds_left <= 3600
    slept = 3601.0
    for each in (images, reopened):
        with pytest.raises(Gone):
            each.read(name)


def test_after_a_start_of_the_machine_its_date_counts_but_never_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = FolderClock(tmp_path)()
    wall = time.time
    monkeypatch.setattr("server.process.data_folder.BOOT_ID", tmp_path / "another")
    (tmp_path / "another").write_text("another")
    monkeypatch.setattr("time.time", lambda: wall() + 1000)
    assert FolderClock(tmp_path)() == pytest.approx(now + 1000, abs=100)
    (tmp_path / "another").write_text("a third")
    monkeypatch.setattr("time.time", lambda: 0.0)  # a machine without a battery, before it has asked for the time
    assert FolderClock(tmp_path)() == pytest.approx(now + 1000, abs=100)
    (tmp_path / "clock.json").write_text("{}")
    assert FolderClock(tmp_path)() == pytest.approx(0.0, abs=100)
