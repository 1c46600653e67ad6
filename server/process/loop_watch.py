"""Watches the event loop: how late it is, as a figure, and for systemd's watchdog, as a sign of life.

The signs come from the loop itself, so a loop that hangs sends none, and systemd starts the server anew. The protocol
is a datagram of text to the socket that `NOTIFY_SOCKET` names (sd_notify(3)); without the variable nothing is sent.
"""

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Mapping

import structlog

INTERVAL = 0.25  # seconds between looks
REMEMBERED = 240  # looks: a minute
SIGNS = 3  # in the time after which systemd gives up
log = structlog.get_logger("srpo")


class LoopWatch:
    """`environment`: where systemd's variables are."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._every = float(environment.get("WATCHDOG_USEC") or "inf") / 1e6 / SIGNS  # seconds
        self._lags: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def lag(self) -> float:
        """The most seconds by which the loop was late within the last minute."""
        return max(self._lags, default=0.0)

    async def run(self) -> None:
        """Never returns."""
        due, pause = 0.0, min(INTERVAL, self._every)
        while True:
            before = time.monotonic()
            if before >= due:
                if due:
                    self.notify("WATCHDOG=1")
                due = before + self._every
            await asyncio.sleep(pause)
            self._lags.append(max(0.0, time.monotonic() - before - pause))

    def notify(self, text: str) -> None:
        """Tell systemd, if it has asked. Never raises and never waits: a lost sign is followed by the next one."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(text.encode(), address)
        except OSError as error:
            log.warning("systemd_not_told", text=text, reason=error.strerror)
