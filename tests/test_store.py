"""The image store on a real folder."""

import os
import threading
import time
from pathlib import Path

import pytest

from server.errors import Gone, NotFound, StorageFull
from server.images.encoding import EncodedImage
from server.images.store import LocalStore

BASE = "http://127.0.0.1:8000"


def image(size: int = 1000, fill: bytes = b"x") -> EncodedImage:
    return EncodedImage(fill * size, "png", 1, 1)


def store(tmp_path: Path, expire: float = 100.0, cap: int = 10**6) -> LocalStore:
    return LocalStore(tmp_path, expire, cap)


def test_what_is_put_is_found_under_an_unguessable_name(tmp_path: Path) -> None:
    images = store(tmp_path)
    stored = [images.put(image(fill=bytes([65 + i])), BASE) for i in range(20)]
    assert len({item.name for item in stored}) == 20
    for number, item in enumerate(stored):
        path, content_type, left = images.find(item.name)
        assert path.read_bytes() == bytes([65 + number]) * 1000
        assert (content_type, item.url) == ("image/png", f"{BASE}/files/{item.name}")
        assert 0 < left <= 100


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "../images.key",
        "..%2fimages.key",
        "A" * 32 + ".png",
        "A" * 32 + ".exe",
        "A" * 32 + ".png/..",
        "\0" * 36,
    ],
)
def test_names_that_never_were_are_unknown(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        store(tmp_path).find(name)


def test_an_expired_image_is_gone_and_stays_gone_after_a_restart(tmp_path: Path) -> None:
    images = store(tmp_path)
    name = images.put(image(), BASE).name
    path, _, _ = images.find(name)
    old = time.time() - 101
    os.utime(path, (old, old))
    with pytest.raises(Gone):
        images.find(name)
    reopened = store(tmp_path)
    assert not path.exists()
    with pytest.raises(Gone):
        reopened.find(name)


def test_beyond_the_cap_the_oldest_go_first(tmp_path: Path) -> None:
    images = store(tmp_path, cap=3500)
    names = []
    for number in range(3):
        names.append(images.put(image(), BASE).name)
        written = time.time() - 50 + number
        os.utime(images.find(names[-1])[0], (written, written))
    names.append(images.put(image(), BASE).name)
    with pytest.raises(Gone):
        images.find(names[0])
    assert all(images.find(name) for name in names[1:])


def test_leftovers_of_a_crash_are_cleared_and_never_served(tmp_path: Path) -> None:
    images = store(tmp_path)
    path, _, _ = images.find(images.put(image(), BASE).name)
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


def test_many_threads_may_put_at_once(tmp_path: Path) -> None:
    images, names = store(tmp_path, cap=10**9), []
    threads = [threading.Thread(target=lambda: names.append(images.put(image(), BASE).name)) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(images.find(name)[0].stat().st_size == 1000 for name in names)
    assert len(names) == 32
