"""Source pictures: what is fetched from where, and what becomes of the bytes."""

import asyncio
import base64
import io
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.pictures import INWARD, Peer, file_of

from pipelines.request import IMAGE_SIZE
from server.images import fetch
from server.images import source as inputs
from server.images.fetch import Unfetchable
from server.images.source import UnusableImage
from server.threads import ThreadPools


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
        asyncio.run(inputs.read_url("https://example.com/a.png", may_fetch=False, pools=ThreadPools()))


# --- from bytes to pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_data_uri_of_a_size_that_is_drawn_keeps_every_pixel(format: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (512, 544, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {}))
    uri = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    size, drawn = inputs.decode(io.BytesIO(asyncio.run(inputs.read_url(uri, may_fetch=False, pools=ThreadPools()))))
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
    size, drawn = inputs.decode(io.BytesIO(file_of(image, exif=exif)))
    assert tuple(size) == (544, 512)
    assert set(drawn) == {255}


@pytest.mark.parametrize("side", [6000, 12000, 20000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = file_of(Image.new("1", (side, side)))
    assert len(bomb) < 2**17
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(UnusableImage, match="pixels"):
        inputs.decode(io.BytesIO(bomb))


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
        inputs.decode(io.BytesIO(data))


@pytest.mark.parametrize("uri", ["data:image/png,abc", "data:image/png;base64,%%%", "data:"])
def test_a_data_uri_that_is_none(uri: str) -> None:
    with pytest.raises(UnusableImage, match="base64"):
        asyncio.run(inputs.read_url(uri, may_fetch=True, pools=ThreadPools()))


MEMORY = """
import asyncio, io
from pathlib import Path
from PIL import Image
from server.images.source import Sources
from server.threads import ThreadPools
import base64
file = io.BytesIO()
Image.new("RGBA", (5792, 5792), (9, 8, 7, 100)).save(file, "PNG", compress_level=1)
uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
async def main():
    sources = Sources(ThreadPools(), may_fetch=False)
    await asyncio.gather(*(sources.load(uri) for _ in range(4)))
asyncio.run(main())
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def test_large_pictures_are_decoded_one_at_a_time() -> None:
    """Four of the largest that are taken: 134 MB each as RGBA, and twice as much while they are laid on white."""
    ended = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) * 1024 < 550 * 10**6
