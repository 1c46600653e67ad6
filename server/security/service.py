"""The keys of a running server: read again every few seconds, at once where this server changes them."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import structlog

from server.errors import StorageFailure
from server.process.threads import ThreadPools
from server.security.keys import KeyRing
from server.security.models import KeyRecord
from server.security.store import KeyStore

INTERVAL = 2.0  # seconds: so long may a key that was revoked elsewhere still be used
log = structlog.get_logger("srpo")
R = TypeVar("R")


class KeyService:
    """Keeps a ring as the database has it."""

    def __init__(self, ring: KeyRing, store: KeyStore, threads: ThreadPools) -> None:
        self._ring = ring
        self._store = store
        self._threads = threads
        self._lock = asyncio.Lock()  # an older reading must not replace a newer one

    def load(self) -> None:
        """Read the keys before anybody asks, in this thread. Raises what `Database` does."""
        self._ring.replace(self._store.read())

    async def reload(self) -> None:
        """Raises what `Database` does; then the ring is as it was."""
        async with self._lock:
            self._ring.replace(await self._threads.run("database", self._store.read))

    async def list(self) -> list[KeyRecord]:
        """All keys, revoked ones too."""
        return await self._threads.run("database", self._store.list)

    async def change(self, action: Callable[[KeyStore], R]) -> R:
        """Do something to the keys; what it has changed counts from when this returns."""
        result = await self._threads.run("database", action, self._store)
        await self.reload()
        return result

    async def run(self) -> None:
        """Reload again and again. Never ends. Where the database cannot be read the last known keys stay valid."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self.reload()
            except StorageFailure as error:
                log.error("keys_not_reloaded", error=type(error).__name__)
