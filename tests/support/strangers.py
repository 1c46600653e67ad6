"""Strangers that are slow on purpose: services that drip their answers, clients that drip their requests; and clients
that leave.
"""

import asyncio
import socket
import threading
from contextlib import closing, suppress
from typing import Any

import httpx

PACE = 0.02  # seconds between two bytes of a service
DRIP = 0.2  # seconds between two bytes of a client: there are hundreds of them


class DrippingService:
    """An HTTP service on loopback that answers with `start`, and then a byte at a time for ever."""

    def __init__(self, start: bytes) -> None:
        self.connections = 0
        self._start = start
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.connections += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        pause = threading.Event()
        with closing(connection):
            try:
                connection.recv(2**16)
                connection.sendall(self._start)
                while not pause.wait(PACE):
                    connection.sendall(b"x")
            except OSError:
                pass  # the other side has given up


class Leaver:
    """A client that posts `body` and reads nothing of the reply. `leave` closes its connection."""

    def __init__(self, url: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        request = httpx.Request("POST", url, json=body, headers=headers)
        lines = [f"{name}: {value}" for name, value in request.headers.items()]
        head = "\r\n".join([f"POST {request.url.path} HTTP/1.1", *lines, "", ""])
        self._socket = socket.create_connection((request.url.host, request.url.port or 80))
        self._socket.sendall(head.encode() + request.content)

    def leave(self) -> None:
        self._socket.close()


class SlowSockets:
    """Connections to a server that send `start`, and then a byte at a time for ever; `patient` ones send no more.

    One asyncio client in a thread of its own holds them all. `heard` is what each got that the server has closed.
    """

    def __init__(self, port: int, count: int, start: bytes, *, patient: bool = False) -> None:
        self.heard: list[bytes] = []
        self._hearing: list[bytearray] = []
        self.opened = 0
        self._arguments = (port, start, patient)
        self._count = count
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._hold_all(),))

    def __enter__(self) -> "SlowSockets":
        self._stop = asyncio.Event()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    @property
    def closed(self) -> int:
        """How many the server has closed."""
        return len(self.heard)

    def hearing(self) -> list[bytes]:
        """What each has got so far, closed or not."""
        return [bytes(heard) for heard in self._hearing]

    async def _hold_all(self) -> None:
        holding = [asyncio.ensure_future(self._hold(*self._arguments)) for _ in range(self._count)]
        await self._stop.wait()
        for task in holding:
            task.cancel()
        await asyncio.gather(*holding, return_exceptions=True)
        await asyncio.sleep(0)  # in which their sockets are closed

    async def _hold(self, port: int, start: bytes, patient: bool) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self.opened += 1
        writer.write(start)
        dripping = asyncio.ensure_future(self._drip(writer, patient))
        heard = bytearray()
        self._hearing.append(heard)
        try:
            with suppress(ConnectionError):
                while piece := await reader.read(2**16):
                    heard += piece
            self.heard.append(bytes(heard))
        finally:
            dripping.cancel()
            writer.transport.abort()

    @staticmethod
    async def _drip(writer: asyncio.StreamWriter, patient: bool) -> None:
        with suppress(ConnectionError):
            while not patient:
                await asyncio.sleep(DRIP)
                writer.write(b"x")
                await writer.drain()
