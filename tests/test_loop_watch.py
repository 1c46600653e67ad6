"""What systemd hears of the server, over a real socket, and how late the event loop was."""

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from support.scripted_server import Scripted
from support.waiting import LIMIT, within

from server.process.loop_watch import LoopWatch


def systemd(address: str) -> socket.socket:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(address)
    receiver.settimeout(LIMIT)
    return receiver


def test_systemd_hears_that_the_server_answers_lives_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    heard: list[bytes] = []
    with systemd(str(tmp_path / "notify")) as receiver, ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_until_stopping, receiver, heard)  # all the time, as systemd does: it holds ten
        with Scripted(tmp_path / "data") as server:
            assert httpx.get(f"{server.url}/health").json()["loop_lag"] >= 0
            assert within(LIMIT, lambda: heard.count(b"WATCHDOG=1") >= 2)
        reading.result()
    first, *signs, last = heard
    assert (first, last) == (b"READY=1", b"STOPPING=1")
    assert set(signs) == {b"WATCHDOG=1"}


def read_until_stopping(receiver: socket.socket, heard: list[bytes]) -> None:
    while b"STOPPING=1" not in heard:
        heard.append(receiver.recv(99))


async def test_a_loop_that_is_held_up_shows_and_sends_no_sign_of_life(tmp_path: Path) -> None:
    address = "@srpo-test-" + tmp_path.name
    watch = LoopWatch({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000"})
    with systemd("\0" + address[1:]) as receiver:
        task = asyncio.create_task(watch.run())
        await asyncio.to_thread(receiver.recv, 99)  # it runs
        receiver.setblocking(False)
        with suppress(BlockingIOError):
            while receiver.recv(99):
                pass
        time.sleep(1.0)  # noqa: ASYNC251 - it holds the loop up
        with pytest.raises(BlockingIOError):
            receiver.recv(99)
        await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert watch.lag > 0.5
        task.cancel()
