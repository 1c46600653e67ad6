"""A TCP proxy on a loopback port whose network can be made bad: connections are cut, held open without a word, slowed
down, or lose their answers.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Mode = Literal["pass", "cut", "hold", "lose-answers"]
CHUNK = 2**16


class TcpProxy:
    """Passes connections on to `port`. Setting `mode` or `delay` (seconds, each way) changes open ones too.

    `cut` closes them, `hold` takes everything and answers nothing, `lose-answers` passes requests on and closes instead
    of answering.
    """

    def __init__(self, port: int) -> None:
        self.mode: Mode = "pass"
        self.delay = 0.0
        self.port = 0
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._writers: set[asyncio.StreamWriter] = set()

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Close what is open, and whatever comes."""
        self.mode = "cut"
        self._loop.call_soon_threadsafe(self._close_all)

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        self._close_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _close_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "cut":
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            with suppress(OSError, asyncio.CancelledError):  # the latter when the proxy closes
                upstream, onward = await asyncio.open_connection("127.0.0.1", self._target)
                self._writers.add(onward)
                copies = (self._copy(reader, onward, answers=False), self._copy(upstream, writer, answers=True))
                tasks = [asyncio.ensure_future(copy) for copy in copies]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                onward.transport.abort()
                self._writers.discard(onward)
        finally:
            writer.transport.abort()
            self._writers.discard(writer)

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await source.read(CHUNK):
            await asyncio.sleep(self.delay)
            if self.mode == "hold":
                continue
            if self.mode == "cut" or (self.mode == "lose-answers" and answers):
                return
            target.write(data)
            await target.drain()


@contextmanager
def proxy_to(port: int) -> Iterator[TcpProxy]:
    proxy = TcpProxy(port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
