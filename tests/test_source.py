"""Source pictures: what is fetched from where, and what becomes of the bytes."""

import asyncio
import base64
import functools
import io
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from support.pictures import INWARD, Peer, file_of, open_image

from pipelines.request import IMAGE_SIZE
from pipelines.workers.pool import WorkerPool
from server.database.database import Database
from server.database.sqlite import sqlite_url
from server.errors import KeyLimitReached
from server.images import fetch
from server.images import source as inputs
from server.images.decoding import UnusableImage, decode, has_several_scans
from server.images.fetch import Unfetchable
from server.outbound import Exchange
from server.process.threads import POOLS, ThreadPools
from server.security.callers import Caller, Quota
from server.security.limits import KeyLimits
from server.security.rates import RequestRates
from server.settings.limits import SOURCE_MEMORY

JFIF: dict[str, dict[str, Any]] = {"JPEG": {"dpi": (72, 72)}}  # then Pillow does not look at the EXIF when it opens it


@pytest.mark.parametrize("host", INWARD)
def test_addresses_that_are_not_public_are_never_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it connected"))
    with pytest.raises(Unfetchable, match=r"not on the public internet|cannot be resolved"):
        asyncio.run(fetch.fetch(f"http://{host}/", ThreadPools()))


@pytest.mark.usefixtures("public")
def test_a_picture_is_fetched() -> None:
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
    assert asyncio.run(fetch.fetch(peer.url, ThreadPools())) == b"hello"
    peer.close()


@pytest.mark.parametrize(("scheme", "port", "named"), [("http", 80, ""), ("https", 443, ""), ("https", 8443, ":8443")])
def test_the_port_that_a_scheme_has_anyway_is_not_in_the_host_that_may_be_signed(
    scheme: str, port: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(Exchange, "_connect", lambda *_, **__: ours)
    theirs.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
    assert fetch.Download(f"{scheme}://store.example:{port}/a?X-Amz-Signature=b").run() == b"hi"
    heard = theirs.recv(2**16).lower()
    theirs.close()
    assert f"\r\nhost: store.example{named}\r\n".encode() in heard
    assert b"\r\nuser-agent: srpo" in heard


@pytest.mark.usefixtures("public")
def test_letters_that_an_address_may_not_have_are_escaped() -> None:
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
    assert asyncio.run(fetch.fetch(f"{peer.url}/é ü%20?a=ö b", ThreadPools())) == b"hello"
    peer.close()
    assert peer.heard.startswith(b"GET /picture/%C3%A9%20%C3%BC%20?a=%C3%B6%20b HTTP/1.1")


@pytest.mark.parametrize(
    "url",
    ["http://", "http://a\0b/", "http://[::1/", "http://x:99999/", "http://\u2028/", "http://" + "a" * 300, "ftp://x/"],
)
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(Unfetchable):
        asyncio.run(fetch.fetch(url, ThreadPools()))


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize("location", ["{canary}", "//127.0.0.2/", "http://[::1]/", "file:///etc/passwd", "gopher://x/"])
def test_a_redirect_is_checked_like_the_address_itself(canary: Peer, location: str) -> None:
    answer = f"HTTP/1.1 302 Found\r\nlocation: {location.format(canary=canary.url)}\r\ncontent-length: 0\r\n\r\n"
    peer = Peer("127.0.0.1", answer.encode())
    with pytest.raises(Unfetchable, match=r"public internet|only http"):
        asyncio.run(fetch.fetch(peer.url, ThreadPools()))
    peer.close()
    assert (peer.connections, canary.connections) == (1, 0)


@pytest.mark.usefixtures("public")
def test_a_name_is_looked_up_once_so_that_it_cannot_change_in_between(
    canary: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    port = int(peer.url.split(":")[2].split("/")[0])
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])
    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, port, **options: found(next(answers), port, **options))
    assert asyncio.run(fetch.fetch(f"http://rebinding.example:{port}/", ThreadPools())) == b"ok"
    peer.close()
    assert canary.connections == 0


@pytest.mark.usefixtures("public")
async def test_who_waits_behind_slow_name_servers_still_has_all_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can end a look-up of a name, so its thread is taken for as long as it takes."""
    slow, found, threads = 3.0, socket.getaddrinfo, ThreadPools()
    monkeypatch.setattr(fetch, "SECONDS", 5.0)

    def look_up(host: str, port: int, **options: Any) -> Any:
        if host == "slow.example":
            time.sleep(slow)
            raise OSError
        return found(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    peer = Peer("127.0.0.1", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
    others = [asyncio.ensure_future(fetch.fetch("http://slow.example/", threads)) for _ in range(2 * POOLS["fetching"])]
    await asyncio.sleep(0)
    assert await fetch.fetch(peer.url, threads) == b"hello"
    assert all(isinstance(ended, Unfetchable) for ended in await asyncio.gather(*others, return_exceptions=True))
    peer.close()
    threads.close()


@pytest.mark.usefixtures("public")
@pytest.mark.parametrize(
    ("reply", "drip", "message"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True, "larger than 1 MiB"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", False, "answered 404"),
        (b"nonsense\r\n\r\n", False, "could not be fetched"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", False, "only in part"),
    ],
)
def test_what_is_no_picture_is_said(reply: bytes, drip: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 2**20)
    peer = Peer("127.0.0.1", reply, drip)
    with pytest.raises(Unfetchable, match=message):
        asyncio.run(fetch.fetch(peer.url, ThreadPools()))
    peer.close()


@pytest.mark.usefixtures("public")
def test_a_silent_host_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(Unfetchable, match="did not arrive"):
        asyncio.run(fetch.fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/", ThreadPools()))


def test_nothing_is_fetched_where_the_operator_said_so() -> None:
    with pytest.raises(UnusableImage, match="--no-fetch"):
        asyncio.run(inputs.read_url("https://example.com/a.png", may_fetch=False, threads=ThreadPools()))


# --- from bytes to pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_data_uri_of_a_size_that_is_drawn_keeps_every_pixel(format: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (512, 544, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    uri = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    size, drawn = decode(
        io.BytesIO(asyncio.run(inputs.read_url(uri, may_fetch=False, threads=ThreadPools()))), SOURCE_MEMORY
    )
    assert (size.width, size.height) == (544, 512)
    assert drawn == pixels.tobytes()


@pytest.mark.parametrize(
    ("sides", "drawn"),
    [
        ((1024, 768), (1024, 768)),
        ((100, 100), (512, 512)),
        ((4000, 3000), (1536, 1152)),
        ((1000, 700), (992, 704)),
        ((3000, 300), (1536, 512)),
        ((10, 3000), (512, 1536)),
        ((1, 1), (512, 512)),
    ],
)
def test_the_size_that_is_drawn(sides: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert tuple(IMAGE_SIZE.nearest(*sides)) == drawn


def test_a_picture_is_turned_upright_and_laid_on_white() -> None:
    image = Image.new("RGBA", (512, 544), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    size, drawn = decode(io.BytesIO(file_of(image, exif=exif)), SOURCE_MEMORY)
    assert tuple(size) == (544, 512)
    assert set(drawn) == {255}


@pytest.mark.parametrize("side", [6000, 12000, 20000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = file_of(Image.new("1", (side, side)))
    assert len(bomb) < 2**17
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(UnusableImage, match="pixels"):
        decode(io.BytesIO(bomb), SOURCE_MEMORY)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG"),
        (file_of(Image.new("RGB", (600, 600)), "GIF"), "not a PNG"),
        (file_of(Image.new("RGB", (600, 600)), "JPEG")[:400], "damaged"),
        (file_of(Image.effect_noise((600, 600), 50))[:900], "damaged"),
    ],
    ids=["nothing", "postscript", "gif", "cut jpeg", "cut png"],
)
def test_what_is_not_a_whole_picture_is_said(data: bytes, message: str) -> None:
    with pytest.raises(UnusableImage, match=message):
        decode(io.BytesIO(data), SOURCE_MEMORY)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"MM\0*", b"MM\0*\0\0\0", b"Exif\0\0MM\0*\0", b"no TIFF at all", b"II"])
def test_broken_exif_is_no_fault_of_the_picture(format: str, exif: bytes) -> None:
    data = file_of(Image.new("RGB", (512, 544), "white"), format, exif=exif, **JFIF.get(format, {}))
    size, drawn = decode(io.BytesIO(data), SOURCE_MEMORY)
    assert (tuple(size), set(drawn)) == ((512, 544), {255})


START = b"\x89PNG\r\n\x1a\n"


def chunks_of(png: bytes) -> list[bytes]:
    """A PNG's chunks, each whole."""
    chunks, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        chunks.append(png[at:end])
        at = end
    return chunks


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


@pytest.mark.parametrize("late", [chunk(b"iCCP", b""), chunk(b"iCCP", b"x"), chunk(b"iCCP", b"name\0"), b"PLTE"])
def test_chunks_that_come_too_late_or_too_short_are_damage_or_ignored(late: bytes) -> None:
    """Pillow's reader fails in ways of its own where it looks into them."""
    picture = Image.fromarray(np.random.default_rng().integers(0, 255, (64, 64, 3), np.uint8))
    parts = chunks_of(file_of(picture.quantize(8) if late == b"PLTE" else picture))
    whole = decode(io.BytesIO(START + b"".join(parts)), SOURCE_MEMORY)
    if late == b"PLTE":
        late = next(part for part in parts if part[4:8] == b"PLTE")
        parts.remove(late)
    parts.insert(-1, late)
    with suppress(UnusableImage):
        assert decode(io.BytesIO(START + b"".join(parts)), SOURCE_MEMORY) == whole


def test_a_jpeg_whose_components_have_no_samples_is_damaged() -> None:
    data = bytearray(file_of(Image.new("RGB", (600, 600)), "JPEG", progressive=True))
    frame = data.index(b"\xff\xc2") + 10
    for component in range(3):
        data[frame + 3 * component + 1] = 0
    with pytest.raises(UnusableImage, match="damaged"):
        decode(io.BytesIO(data), SOURCE_MEMORY)


@pytest.mark.parametrize(
    "spell",
    [
        lambda text: "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        lambda text: text.rstrip("="),
        lambda text: quote(text, safe=""),
        lambda text: f" {text}\r\n",
    ],
)
def test_a_data_uri_is_read_as_browsers_do(spell: Callable[[str], str]) -> None:
    for length in range(1, 4):
        data = os.urandom(300 + length)
        uri = "data:image/png;base64," + spell(base64.b64encode(data).decode())
        assert asyncio.run(inputs.read_url(uri, may_fetch=True, threads=ThreadPools())) == data


@pytest.mark.parametrize("uri", ["data:image/png,abc", "data:image/png;base64,%%%", "data:image/png;base64,a", "data:"])
def test_a_data_uri_that_is_none(uri: str) -> None:
    with pytest.raises(UnusableImage, match="base64"):
        asyncio.run(inputs.read_url(uri, may_fetch=True, threads=ThreadPools()))


PEAK = """
import io, sys
from pathlib import Path
from PIL import Image
from server.process import memory
from server.images.decoding import UnusableImage, decode, has_several_scans
from server.security.callers import Caller, Quota
from server.security.limits import KeyLimits
from server.security.rates import RequestRates
from server.settings.limits import SOURCE_MEMORY

def measured(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

memory.fix_thresholds()
first = io.BytesIO()
Image.new("RGB", (64, 64)).save(first, sys.argv[1])
decode(first, SOURCE_MEMORY)
before = measured("VmHWM")
with open(sys.argv[2], "rb") as file:
    try:
        size, pixels = decode(file, SOURCE_MEMORY)
        print("read")
    except UnusableImage as error:
        print("refused")
        print(error, file=sys.stderr)
pixels = None
print(measured("VmHWM") - before, measured("VmRSS") - before)
"""
LARGEST = (5792, 5792)  # 33.5 megapixels


@pytest.mark.parametrize(
    ("format", "mode", "size", "options", "verdict"),
    [
        pytest.param("PNG", "RGB", LARGEST, {}, "read", marks=pytest.mark.long),
        ("PNG", "RGBA", LARGEST, {}, "read"),
        pytest.param("PNG", "RGBA", (33500, 1000), {}, "read", marks=pytest.mark.long),
        pytest.param("PNG", "P", LARGEST, {}, "read", marks=pytest.mark.long),
        ("JPEG", "RGB", LARGEST, {}, "read"),
        pytest.param("JPEG", "RGB", LARGEST, {"progressive": True}, "read", marks=pytest.mark.long),
        ("JPEG", "RGB", LARGEST, {"progressive": True, "subsampling": "4:4:4"}, "refused"),
        pytest.param("JPEG", "RGB", (33500, 1000), {}, "read", marks=pytest.mark.long),
        ("WEBP", "RGB", (2270, 2270), {}, "read"),
        pytest.param("WEBP", "RGBA", (2270, 2270), {"lossless": True}, "read", marks=pytest.mark.long),
        ("WEBP", "RGB", LARGEST, {}, "refused"),
    ],
    ids=lambda value: str(value),
)
def test_decoding_takes_64_mib_beyond_the_picture_and_gives_it_back(
    tmp_path: Path, format: str, mode: str, size: tuple[int, int], options: dict[str, Any], verdict: str
) -> None:
    """In a process of its own. A file of some kilobytes cost 375 MB, of which 300 were kept."""
    file = tmp_path / "picture"
    Image.new(mode, size).save(file, format, **options)
    command = [sys.executable, "-c", PEAK, format, str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said, peak, kept = ended.stdout.split()
    assert said == verdict, ended.stderr
    assert int(peak) < SOURCE_MEMORY + 3 * size[0] * size[1]
    assert int(kept) < 2**23
    if verdict == "refused":
        assert "make it smaller" in ended.stderr


@functools.cache
def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft shapes that differ in every direction, and some grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    planes = [127 + 120 * np.sin(x / width * 5 + y / height * k + k) for k in range(len(mode))]
    grain = np.random.default_rng(width).integers(-6, 7, (height, width, 1))
    return Image.fromarray((np.stack(planes, -1) + grain).clip(0, 255).astype("uint8"), mode)


def reference(image: Image.Image, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The whole picture upright on white, scaled in one step."""
    upright = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    flat = Image.alpha_composite(white, upright).convert("RGB")
    return np.asarray(ImageOps.fit(flat, size, Image.Resampling.LANCZOS)).astype(np.int16)


def read(data: bytes) -> tuple[tuple[int, int], np.ndarray[Any, np.dtype[np.int16]]]:
    size, pixels = decode(io.BytesIO(data), SOURCE_MEMORY)
    return (size.width, size.height), np.frombuffer(pixels, np.uint8).reshape(size.height, size.width, 3).astype("i2")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(700, 900), (1900, 1400), (2300, 2000)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_pixels_of_a_picture_that_fits_are_those_of_one_step(
    format: str, size: tuple[int, int], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(photo(*size), format, exif=exif)
    drawn, pixels = read(data)
    assert (pixels == reference(open_image(data), drawn)).all()


@pytest.mark.long
@pytest.mark.parametrize(
    ("format", "mode", "orientation"), [("PNG", "RGBA", 6), *(("JPEG", "RGB", number) for number in range(1, 9))]
)
def test_a_larger_picture_is_shrunk_on_the_way_and_looks_the_same(format: str, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(photo(4100, 3300, mode), format, exif=exif)
    drawn, pixels = read(data)
    difference = abs(pixels - reference(open_image(data), drawn))
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99.9) < 8


def test_a_first_scan_of_one_component_counts_as_several_scans() -> None:
    """Their coefficients are all kept, which nothing else in the file's header says."""
    whole = file_of(Image.new("RGB", (640, 640)), "JPEG")
    at = whole.index(b"\xff\xda")
    split = whole[:at] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + whole[at:]
    for data, several in ((whole, False), (split, True)):
        file = io.BytesIO(data)
        with Image.open(file) as image:
            assert isinstance(image, JpegImageFile)
            assert has_several_scans(image, file) is several


def test_a_text_that_unpacks_to_megabytes_is_refused() -> None:
    chunks = PngImagePlugin.PngInfo()
    for number in range(3):
        chunks.add_text(f"n{number}", "x" * 900_000, zip=True)
    with pytest.raises(UnusableImage, match="damaged"):
        decode(io.BytesIO(file_of(Image.new("RGB", (64, 64)), pnginfo=chunks)), SOURCE_MEMORY)


async def test_slow_addresses_keep_no_upload_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, come = 0, asyncio.Event()

    async def fetch_slowly(url: str, threads: ThreadPools) -> bytes:
        nonlocal begun
        begun += 1
        await come.wait()
        return data

    monkeypatch.setattr("server.images.source.fetch", fetch_slowly)
    data = file_of(Image.new("RGB", (512, 512)))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = inputs.Sources(ThreadPools(), may_fetch=True)
    slow = [asyncio.ensure_future(sources.load(f"https://example.com/{number}")) for number in range(30)]
    while not begun:
        await asyncio.sleep(0)
    loads = (sources.load(uri), sources.load(data), sources.load(io.BytesIO(data)))
    quick = await asyncio.wait_for(asyncio.gather(*loads), 60)
    assert len(quick) == 3
    assert not any(task.done() for task in slow)
    come.set()
    assert await asyncio.gather(*slow) == [quick[0]] * 30


def test_pictures_that_are_being_fetched_count_as_unfinished_requests(tmp_path: Path) -> None:
    """Or one key could have all the places of fetches that are slow."""
    rates = RequestRates(Database(sqlite_url(tmp_path)))
    limits = KeyLimits(Quota(concurrent_requests=3), WorkerPool(lambda _: []), rates, ThreadPools())
    alice, bob = Caller("alice"), Caller("bob")
    with ExitStack() as fetches:
        for _ in range(3):
            fetches.enter_context(limits.loading(alice))
        with pytest.raises(KeyLimitReached), limits.loading(alice):
            pass
        with pytest.raises(KeyLimitReached) as refused:
            limits.check(alice)
        assert refused.value.retry_after >= 1
        limits.check(bob)
    limits.check(alice)
    anybody = Caller("")
    with ExitStack() as fetches:  # a server without keys has one client
        for _ in range(9):
            fetches.enter_context(limits.loading(anybody))


MEMORY = """
import asyncio, base64, io
from pathlib import Path
from PIL import Image
from server.images.source import Sources
from server.process.threads import ThreadPools
file = io.BytesIO()
Image.new("RGBA", (5792, 5792), (9, 8, 7, 100)).save(file, "PNG", compress_level=1)
uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
async def main():
    sources = Sources(ThreadPools(), may_fetch=False)
    await asyncio.gather(*(sources.load(uri) for _ in range(4)))
asyncio.run(main())
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.long
def test_large_pictures_are_decoded_one_at_a_time() -> None:
    """Four of the largest that are taken: 134 MB each as RGBA."""
    ended = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) * 1024 < 300 * 10**6
