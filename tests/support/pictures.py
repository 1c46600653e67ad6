"""Source pictures, and peers that send them."""

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from PIL import Image

from server import outbound

INWARD = [
    "127.1", "0", "2130706433", "0x7f000001", "017700000001", "127.0.0.1", "localhost", "[::1]", "[::]", "0.0.0.0",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "10.0.0.1", "192.168.1.1",
    "172.16.0.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "224.0.0.1", "255.255.255.255",
]  # fmt: skip


class Peer:
    """A server on `host` that sends `reply` to whoever connects, and counts them.

    It waits for `after` before. Then `drip` sends bytes for ever, and `hold` waits for the other side to give up
    (`given_up`).
    """

    def __init__(
        self, host: str, reply: bytes, drip: bool = False, hold: bool = False, after: threading.Event | None = None
    ) -> None:
        self.connections = 0
        self.heard = b""
        self.given_up = threading.Event()
        self._reply, self._drip, self._hold, self._after = reply, drip, hold, after
        self._listener = socket.create_server((host, 0))
        self.url = f"http://{host}:{self._listener.getsockname()[1]}/picture"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with closing(connection):
            try:
                self.heard = connection.recv(2**16)
                if self._after is not None:
                    self._after.wait()
                connection.sendall(self._reply)
                while self._drip:
                    connection.sendall(b"x" * 2**16)
                if self._hold:
                    connection.recv(1)
                    self.given_up.set()
            except OSError:
                self.given_up.set()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def canary() -> Iterator[Peer]:
    """Something inside that nobody may reach."""
    peer = Peer("127.0.0.2", b"HTTP/1.1 200 OK\r\n\r\nsecret")
    yield peer
    peer.close()


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 stands for the public internet."""
    monkeypatch.setattr(outbound, "is_public", lambda address: str(address) == "127.0.0.1")


def file_of(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def open_image(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image
