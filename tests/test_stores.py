"""What every store does, on a real folder and on a real S3 service; and a bucket on a bad network."""

import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.buckets import CREDENTIALS, S3Service
from support.scripted_server import Scripted
from support.tcp_proxy import TcpProxy, proxy_to
from support.waiting import LIMIT

from server.errors import Gone, NotFound, StorageFull, StoreUnavailable
from server.images.encoding import EncodedImage
from server.images.stores import s3 as s3_store
from server.images.stores.base import Retention, Store
from server.images.stores.s3 import S3Store, key_of
from server.images.stores.table import open_store
from server.process.data_folder import FolderClock
from server.settings.server import Settings
from server.settings.storage import STORES

BASE = "http://127.0.0.1:8000"


@dataclass
class Place:
    """A place of one kind that stores can be opened on, as a server does it."""

    settings: dict[str, Any]
    age: Callable[[str, float], None]  # let an image have been put so many seconds ago
    data: Path  # folder of the server

    def open(self, expire: float = 100.0, cap: int = 10**6, **settings: Any) -> Store:
        options = self.settings | {"images_expire": expire, "images_cap": cap} | settings
        return open_store(Settings.model_validate(options), FolderClock(self.data))


@pytest.fixture(params=sorted(STORES))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        service: S3Service = request.getfixturevalue("s3")
        url = service.create_bucket()
        settings = {"store_url": url, "store_endpoint": service.endpoint}
        return Place(settings, lambda name, seconds: service.age(url, key_of(name), seconds), tmp_path / "data")

    def age(name: str, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(tmp_path / "images" / name[:2] / name, (then, then))

    return Place({"store_url": tmp_path.as_uri()}, age, tmp_path / "data")


def image(size: int = 1000, fill: bytes = b"x") -> EncodedImage:
    return EncodedImage(fill * size, "png", 1, 1)


def test_what_is_put_is_found_under_an_unguessable_name(place: Place) -> None:
    images = place.open()
    stored = [images.put(image(fill=bytes([65 + i])), BASE) for i in range(20)]
    assert len({item.name for item in stored}) == 20
    for number, item in enumerate(stored):
        found = images.read(item.name)
        assert found.data == bytes([65 + number]) * 1000
        assert (found.content_type, item.url) == ("image/png", f"{BASE}/files/{item.name}")
        assert 0 < found.seconds_left <= 101  # a bucket counts whole seconds
    assert images.size == 20_000


def test_large_images_of_random_bytes_come_back_as_they_are(place: Place) -> None:
    images = place.open(cap=10**8)
    data = random.Random().randbytes(9 * 2**20)
    name = images.put(EncodedImage(data, "jpeg", 1, 1), BASE).name
    assert hashlib.sha256(images.read(name).data).digest() == hashlib.sha256(data).digest()


NAMES = [
    "",
    "x",
    "../images.key",
    "..%2fimages.key",
    "A" * 32 + ".png",
    "A" * 32 + ".exe",
    "A" * 32 + ".png/..",
    "\0" * 36,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_never_were_are_unknown(place: Place, name: str) -> None:
    with pytest.raises(NotFound):
        place.open().read(name)


def test_an_expired_image_is_gone_and_stays_gone_after_a_restart(place: Place) -> None:
    images = place.open()
    name, kept = (images.put(image(), BASE).name for _ in range(2))
    place.age(name, 102)
    with pytest.raises(Gone):
        images.read(name)
    reopened = place.open()
    reopened.maintain()
    assert reopened.size == 1000
    with pytest.raises(Gone):
        reopened.read(name)
    assert reopened.read(kept).data == image().data


@pytest.mark.parametrize("days", [-2, 2])
def test_a_date_that_is_set_wrong_expires_nothing_and_lets_nothing_stay(
    place: Place, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Servers share a bucket: one whose date was ahead deleted the images of all."""
    running = place.open(link_lifetime=60.0)
    kept, expired = (running.put(image(), BASE) for _ in range(2))
    place.age(expired.name, 102)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + days * 86400)
    begun_anew = place.open(link_lifetime=60.0)
    for images in (running, begun_anew):
        images._next_sweep = 0.0  # type: ignore[attr-defined]
        images.maintain()
        assert images.size == 1000
        found = images.read(kept.name)
        assert found.data == image().data
        assert 50 < found.seconds_left <= 101
        assert 0 < images.links.check(kept.name, dict(httpx.URL(kept.url).params)) <= 61
        with pytest.raises(Gone):
            images.read(expired.name)


def test_beyond_the_cap_the_oldest_go_first(place: Place) -> None:
    images = place.open(cap=3500)
    names = []
    for number in range(3):
        names.append(images.put(image(), BASE).name)
        place.age(names[-1], 50 - number)
    names.append(images.put(image(), BASE).name)
    images.maintain()
    with pytest.raises(Gone):
        images.read(names[0])
    assert all(images.read(name) for name in names[1:])


def test_many_threads_may_put_at_once(place: Place) -> None:
    images = place.open(cap=10**9)
    with ThreadPoolExecutor(32) as threads:
        names = list(threads.map(lambda _: images.put(image(), BASE).name, range(32)))
    assert len(set(names)) == 32
    assert all(len(images.read(name).data) == 1000 for name in names)


def test_stores_that_open_one_place_at_once_know_each_others_images_and_addresses(place: Place) -> None:
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(lambda _: place.open(link_lifetime=60.0), range(4)))
    for writer in stores:
        stored = writer.put(image(), BASE)
        query = dict(httpx.URL(stored.url).params)
        for reader in stores:
            assert reader.read(stored.name).data == image().data
            assert reader.links.check(stored.name, query) > 50


# --- what is a bucket's own ------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3: S3Service) -> str:
    return s3.create_bucket()


@pytest.fixture
def network(s3: S3Service) -> Iterator[TcpProxy]:
    with proxy_to(s3.port) as proxy:
        yield proxy


@pytest.fixture
def images(bucket: str, network: TcpProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A store whose bucket is behind the network."""
    return S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=f"http://127.0.0.1:{network.port}")


def test_objects_are_below_the_prefix_and_named_in_no_other_place(s3: S3Service, bucket: str) -> None:
    images = S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=s3.endpoint)
    name = images.put(image(), BASE).name
    assert s3.keys(bucket) == ["images.key", f"images/{name[:2]}/{name}"]


def test_a_signed_url_gives_the_image_to_whoever_has_it(s3: S3Service, bucket: str) -> None:
    images = S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=s3.endpoint, signed_urls=True)
    name = images.put(image(), BASE).name
    url = images.sign_url(name, "GET", 60)
    assert url is not None
    assert "X-Amz-Expires=60&" in f"{url}&"  # what is left of the link that it is given for
    assert re.search(r"X-Amz-Expires=(99|10[01])\b", str(images.sign_url(name, "GET", inf)))  # and of the image
    reply = httpx.get(url)
    assert (reply.content, reply.headers["content-type"]) == (image().data, "image/png")
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in url
    s3.age(bucket, key_of(name), 102)
    with pytest.raises(Gone):
        images.sign_url(name, "GET", 60)
    with pytest.raises(NotFound):
        images.sign_url("A" * 32 + ".png", "GET", 60)


def test_without_credentials_nobody_is_asked_for_them() -> None:
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID"):
        S3Store("s3://bucket", Retention(100.0, 10**6), {})


def test_a_bucket_that_is_not_there_is_a_reason_not_to_start(s3: S3Service) -> None:
    with pytest.raises(ValueError, match="no such bucket"):
        S3Store("s3://nowhere", Retention(100.0, 10**6), os.environ, endpoint=s3.endpoint)


def test_a_bucket_that_can_only_be_read_has_failed_until_it_can_be_written(
    s3: S3Service, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "PATIENCE", 0.0)
    images = S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=s3.endpoint)
    with s3.read_only():
        for attempt in (lambda: images.put(image(), BASE), images.maintain):
            with pytest.raises(StoreUnavailable):
                attempt()
            assert images.failure is not None
    images.maintain()
    assert images.failure is None
    assert s3.keys(bucket) == ["images.key"]


@pytest.mark.parametrize("first", ["this server", "another"])
def test_a_bucket_that_was_deleted_is_a_failure_and_servers_agree_on_the_names_in_a_new_one(
    s3: S3Service, bucket: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has expired: an image that cannot be put waits."""
    monkeypatch.setattr(s3_store, "PATIENCE", 0.0)
    images = S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=s3.endpoint)
    with s3.without_bucket(bucket):
        for attempt in (lambda: images.put(image(), BASE), images.maintain):
            with pytest.raises(StoreUnavailable):
                attempt()
            assert images.failure is not None
    if first == "this server":
        images.put(image(), BASE)  # waiting images come first, and it has not failed any more
        images.maintain()
    other = S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=s3.endpoint)
    images.maintain()
    assert images.failure is None
    assert other.read(images.put(image(), BASE).name).data == image().data


def test_a_bucket_that_takes_no_more_gets_room_by_what_expires(s3: S3Service, bucket: str) -> None:
    before = S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=s3.endpoint)
    for _ in range(3):
        s3.age(bucket, key_of(before.put(image(), BASE).name), 102)
    with s3.read_only():
        begun_full = S3Store(bucket, Retention(100.0, 2000), os.environ, endpoint=s3.endpoint)
        with pytest.raises(StoreUnavailable):
            begun_full.maintain()
        assert begun_full.size == 2000  # it cannot know what time it is there, and what is too much goes
        before._next_sweep = 0.0
        with pytest.raises(StoreUnavailable):
            before.maintain()
        assert before.size == 0
        assert before.failure is not None


def test_an_image_is_put_when_a_bucket_that_refused_is_back(images: S3Store, network: TcpProxy) -> None:
    network.cut()
    back = threading.Timer(1.5, lambda: setattr(network, "mode", "pass"))
    back.start()
    name = images.put(image(), BASE).name
    back.join()
    assert images.read(name).data == image().data
    assert images.failure is None


def test_a_bucket_that_was_given_up_is_tried_once_an_image(
    images: S3Store, network: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty images that wait for four threads would wait for as many patiences."""
    monkeypatch.setattr(s3_store, "PATIENCE", 3.0)
    network.cut()
    tries: list[str] = []
    create = images._create

    def noted(key: str, *rest: Any) -> None:
        tries.append(key)
        create(key, *rest)

    monkeypatch.setattr(images, "_create", noted)
    with pytest.raises(StoreUnavailable):
        images.put(image(), BASE)
    assert tries.count(tries[0]) > 1
    time.sleep(3.5)  # it has been away for longer than that now
    tries.clear()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            images.put(image(), BASE)
    assert len(tries) == len(set(tries)) == 3
    network.mode = "pass"
    assert images.read(images.put(image(), BASE).name).data == image().data


def test_an_image_whose_confirmation_is_lost_is_put_once(
    images: S3Store, network: TcpProxy, s3: S3Service, bucket: str
) -> None:
    network.mode = "lose-answers"
    with ThreadPoolExecutor(1) as threads:
        putting = threads.submit(images.put, image(), BASE)
        while len(s3.keys(bucket)) < 2:  # it is there, and nobody was told
            time.sleep(0.01)
        network.mode = "pass"
        name = putting.result().name
    assert s3.keys(bucket) == ["images.key", f"images/{name[:2]}/{name}"]


@pytest.mark.parametrize("mode", ["cut", "hold"])
def test_a_bucket_that_stays_away_is_told_as_such_and_found_again(
    images: S3Store, network: TcpProxy, mode: Any, monkeypatch: pytest.MonkeyPatch, s3: S3Service, bucket: str
) -> None:
    name = images.put(image(), BASE).name
    monkeypatch.setattr(s3_store, "PATIENCE", 0.0)
    monkeypatch.setattr(s3_store, "TIMEOUT", s3_store.timedelta(seconds=2))  # it must do for a bucket that answers
    hasty = S3Store(bucket, Retention(100.0, 10**6), os.environ, endpoint=f"http://127.0.0.1:{network.port}")
    network.mode = mode
    for attempt in (lambda: hasty.put(image(), BASE), lambda: hasty.read(name), hasty.maintain):
        with pytest.raises(StoreUnavailable):
            attempt()
        assert hasty.failure is not None
    network.mode = "pass"
    hasty.maintain()
    assert hasty.failure is None
    assert hasty.read(name).data == image().data


def test_a_slow_network_only_takes_longer(images: S3Store, network: TcpProxy) -> None:
    network.delay = 0.05
    name = images.put(image(10**5), BASE).name
    assert images.read(name).data == image(10**5).data


def test_a_plain_request_is_told_that_its_bucket_was_deleted(
    s3: S3Service, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(s3_store, "PATIENCE", 0.0)
    body = {"model": "flux/srpo", "prompt": "quick", "image_size": "square"}
    with Scripted(tmp_path, store_url=bucket, store_endpoint=s3.endpoint) as server:
        with s3.without_bucket(bucket):
            refused = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=LIMIT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")


def test_a_file_in_the_place_of_the_folder_is_a_failure_of_the_store(tmp_path: Path) -> None:
    """It is told as one at each look, and the store is well again without the file."""
    folder = tmp_path / "images"
    images = open_store(Settings(store_url=tmp_path.as_uri()), FolderClock(tmp_path / "data"))
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(StorageFull):
        images.put(image(), BASE)
    for _ in range(2):
        with pytest.raises(StorageFull):
            images.maintain()
    folder.unlink()
    images.maintain()
    assert images.failure is None
