"""What runs as long as its process, in the background."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

RESTART = 1.0  # seconds
log = structlog.get_logger("srpo")


async def keep_running(name: str, duty: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Carry out `duty` until it returns. One that fails is logged and begun again: nobody waits for it."""
    while True:
        try:
            return await duty()
        except Exception as error:
            log.error("duty_failed", duty=name, exc_info=error)
        await asyncio.sleep(RESTART)
