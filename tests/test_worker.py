"""The worker's end of the pipe: a thread sends, and what is received is whole, in order and complete."""

import contextlib
import hashlib
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.engine.base import EngineConfig, Report
from pipelines.workers.activity import Activity, ActivityReport
from pipelines.workers.patience import FACTOR, Patience
from pipelines.workers.protocol import PREFIX, Message
from pipelines.workers.worker import UNSENT, Pipe, load

SIZE = 3 * 2**20  # bytes of an image: more than a socket's buffer holds


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def receive(sock: socket.socket) -> list[Message]:
    """All messages until the other end is closed."""
    messages = []
    with sock.makefile("rb") as file:
        while prefix := file.read(PREFIX.size):
            header, payload = PREFIX.unpack(prefix)
            messages.append(Message.decode(file.read(header), file.read(payload)))
    return messages


def test_sending_images_does_not_wait_for_the_reader(ends: tuple[socket.socket, socket.socket]) -> None:
    """Nobody reads until all is sent: a sender that waits for its reader would hang here."""
    ours, theirs = ends
    pipe, pictures = Pipe(theirs), [random.Random(seed).randbytes(SIZE) for seed in range(UNSENT // 2)]
    for number, picture in enumerate(pictures):
        pipe.send("step", step=number)
        pipe.send("image", picture, image=number)
    finish(pipe, theirs)
    messages = receive(ours)
    assert [message.header["event"] for message in messages] == ["step", "image"] * len(pictures)
    assert [message.payload for message in messages[1::2]] == pictures


def test_the_messages_of_several_threads_are_never_mixed(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    pipe = Pipe(theirs)

    def send(sender: int) -> None:
        for number in range(40):
            payload = random.Random(100 * sender + number).randbytes(2**17)
            pipe.send("image", payload, sender=sender, number=number, sha=hashlib.sha256(payload).hexdigest())

    senders = [threading.Thread(target=send, args=[sender]) for sender in range(4)]
    received: list[Message] = []
    reader = threading.Thread(target=lambda: received.extend(receive(ours)))
    for thread in (reader, *senders):
        thread.start()
    for thread in senders:
        thread.join()
    finish(pipe, theirs)
    reader.join()
    assert all(hashlib.sha256(message.payload).hexdigest() == message.header["sha"] for message in received)
    for sender in range(4):
        own = [message.header["number"] for message in received if message.header["sender"] == sender]
        assert own == list(range(40))


def finish(pipe: Pipe, sock: socket.socket) -> None:
    """Let the reader see the end once all that was queued has been sent."""

    def close() -> None:
        pipe._outbox.join()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    threading.Thread(target=close).start()


def run_worker(body: str, sock: socket.socket) -> subprocess.Popen[bytes]:
    """A process that has the other end of `sock`, and carries out `body` with `pipe`."""
    program = "import socket, sys, threading\nfrom pipelines.workers.worker import Pipe\n"
    program += "pipe = Pipe(socket.socket(fileno=int(sys.argv[1])))\n" + body
    return subprocess.Popen(
        [sys.executable, "-c", program, str(sock.fileno())], pass_fds=[sock.fileno()], stdin=subprocess.DEVNULL
    )


def test_a_process_that_ends_has_sent_what_it_was_asked_to(ends: tuple[socket.socket, socket.socket]) -> None:
    """The image that was finished before the device was lost still arrives."""
    ours, theirs = ends
    process = run_worker(f"pipe.send('image', bytes({SIZE}), image=3)\npipe.exit(75)", theirs)
    theirs.close()
    (message,) = receive(ours)
    assert (message.header["image"], message.payload) == (3, bytes(SIZE))
    assert process.wait() == 75


def test_a_broken_pipe_ends_the_worker(ends: tuple[socket.socket, socket.socket]) -> None:
    process = run_worker("sys.stdin.read()\npipe.send('step')\nthreading.Event().wait()", ends[1])
    for sock in ends:
        sock.close()
    assert process.wait() == 0


def test_a_quick_stage_of_loading_is_no_measure_for_the_next(ends: tuple[socket.socket, socket.socket]) -> None:
    """On a CPU a large model is read in seconds and tried for minutes: it would be killed at each start."""
    activity, patience, budgets = Activity(), Patience(), list[float]()
    stages = ("reading", "placing (here)", "trying batches: 2 of 512x512", "trying batches: 4 of 512x512")

    class Staged(EngineConfig):
        def build(self, report: Report) -> Any:
            for stage in stages:
                report(stage, 0.5)
                seen = ActivityReport(**activity.report())
                budgets.append(patience.budget(seen, seen.pace))

    ours, theirs = ends
    pipe = Pipe(theirs)
    load(Staged(), pipe, activity)
    finish(pipe, theirs)
    assert [message.header["stage"] for message in receive(ours)] == [*stages]
    assert budgets == [FACTOR * patience.floor] * 3 + [patience.floor]
