"""Ends a replica's process that has stopped, as by SIGSTOP, so that Ray gives its device to a new one.

Ray asks a process to end and waits for that: one that has stopped never does, and keeps its logical GPU. So a small
process beside it waits for a sign of life each second, and kills it when none has come for too long.
"""

import asyncio
import os
import subprocess
import sys

BEAT = 1.0  # seconds
# Without site-packages, so that it is small. The end of its input means that the process has ended in another way.
PROGRAM = """
import os, select, signal, sys
pid, limit = int(sys.argv[1]), float(sys.argv[2])
while select.select([0], [], [], limit)[0]:
    if not os.read(0, 4096):
        sys.exit()
os.kill(pid, signal.SIGKILL)
"""


async def keep_watched(limit: float) -> None:
    """Never ends. While it runs, this process is killed once its event loop has stood still for `limit` seconds."""
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(os.getpid()), str(limit)]
    watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: ASYNC220 - at once
    assert watchdog.stdin is not None
    try:
        while True:
            os.write(watchdog.stdin.fileno(), b".")
            await asyncio.sleep(BEAT)
    finally:
        watchdog.stdin.close()
        watchdog.wait()
