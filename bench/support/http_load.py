"""Clients that cost little themselves: HTTP/1.1 over a socket, a connection for each, and no more than is needed."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

GENERATIONS = "/v1/images/generations"


class Reply(NamedTuple):
    """`seconds` are from the first byte sent to the last byte received."""

    status: int
    seconds: float
    body: bytes


class Connection:
    """A connection that is kept open from one request to the next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, message: bytes) -> Reply:
        start = time.perf_counter()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**22)
        reader, writer = self._streams
        writer.write(message)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length:")[2].partition("\r\n")[0])
        body = await reader.readexactly(length)
        return Reply(int(head.split(maxsplit=2)[1]), time.perf_counter() - start, body)

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            with suppress(OSError):  # the server was quicker
                await self._streams[1].wait_closed()


def make_post(body: dict[str, Any], path: str = GENERATIONS) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def make_get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()


async def send_in_turn(port: int, messages: Sequence[bytes]) -> list[Reply]:
    """One after the other."""
    connection = Connection(port)
    try:
        return [await connection.send(message) for message in messages]
    finally:
        await connection.close()


async def send_from_clients(port: int, message: bytes, clients: int, seconds: float) -> list[Reply]:
    """Each client sends again as soon as it is answered, until the time is over."""
    end = time.perf_counter() + seconds

    async def keep_sending() -> list[Reply]:
        connection = Connection(port)
        replies: list[Reply] = []
        try:
            while not replies or time.perf_counter() < end:
                replies.append(await connection.send(message))
        finally:
            await connection.close()
        return replies

    return [reply for replies in await asyncio.gather(*(keep_sending() for _ in range(clients))) for reply in replies]


async def send_at(port: int, arrivals: Sequence[tuple[float, bytes]]) -> list[Reply]:
    """Each message at its time, in seconds from now, however many are unanswered; replies in their order."""
    idle: list[Connection] = []
    start = time.perf_counter()

    async def send(at: float, message: bytes) -> Reply:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        connection = idle.pop() if idle else Connection(port)
        try:
            reply = await connection.send(message)
        except BaseException:
            await connection.close()
            raise
        idle.append(connection)
        return reply

    try:
        return await asyncio.gather(*(send(at, message) for at, message in arrivals))
    finally:
        for connection in idle:
            await connection.close()
