"""Writes down what requests without a job have used, before their replies go out.

All that ends while a transaction is on its way shares the next one. Where the database cannot be written the replies
wait a moment and no longer; their usage is kept, and tried again until it is written or the server ends.
"""

import asyncio
import secrets

import structlog

from server.errors import StorageFailure
from server.process.backoff import pauses
from server.process.threads import ThreadPools
from server.usage.ledger import Reservation, UsageEntry, UsageLedger

PATIENCE = 2.0  # seconds that a reply waits for its usage to be written
FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0  # seconds between tries
SWEEP_INTERVAL = 600.0  # seconds
log = structlog.get_logger("srpo")


class UsageWriter:
    """The usage of one server's requests on its way into the database."""

    def __init__(self, ledger: UsageLedger, threads: ThreadPools) -> None:
        self.ledger = ledger
        self._threads = threads
        self._entries: list[UsageEntry] = []
        self._released: list[str] = []
        self._wanted = asyncio.Event()
        self._writing = asyncio.Lock()
        self._written: asyncio.Future[None] | None = None  # resolves with the transaction that has all of the above

    @property
    def unwritten(self) -> int:
        """How many finished requests are not written down yet."""
        return len(self._entries)

    async def reserve(self, owner: str, images: int, quota: int | None, seconds: float) -> str | None:
        """Reserve images of a quota for at most so long; None where there is no quota. Raises `QuotaSpent`."""
        if quota is None or not owner:
            return None
        reservation = Reservation(f"request_{secrets.token_hex(16)}", owner, images, quota, seconds)
        await self._threads.run("database", self.ledger.accept, reservation)
        return reservation.id

    async def record(self, entry: UsageEntry, reservation: str | None) -> None:
        """Write down a finished request. Returns when that is done, or cannot be done for a while."""
        self._entries.append(entry)
        self.release(reservation)
        await asyncio.wait((self._want(),), timeout=PATIENCE)

    def release(self, reservation: str | None) -> None:
        """Give a reservation back, soon."""
        if reservation is not None:
            self._released.append(reservation)
            self._want()

    async def run(self) -> None:
        """Write what comes. Never ends."""
        waits = pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                await asyncio.wait_for(self._wanted.wait(), SWEEP_INTERVAL)
                await self._write()
                waits = pauses(FIRST_PAUSE, MAX_PAUSE)
            except TimeoutError:
                await self._sweep()
            except Exception as error:  # also one that nobody expected: the usage is kept
                pause = next(waits)
                told = {"error": type(error).__name__, "requests": self.unwritten, "again_in": pause}
                log.error("usage_not_written", **told, exc_info=unexpected(error))
                await asyncio.sleep(pause)

    async def stop(self) -> None:
        """Write the rest. What cannot be written now is lost."""
        try:
            await self._write()
        except Exception as error:
            log.error("usage_lost", error=type(error).__name__, requests=self.unwritten, exc_info=unexpected(error))

    async def _write(self) -> None:
        """One transaction with all there is. Raises what `Database` does; then it is all kept."""
        async with self._writing:
            if self._entries or self._released:
                await self._settle()

    async def _settle(self) -> None:
        entries, released, written = self._entries, self._released, self._written
        self._entries, self._released, self._written = [], [], None
        self._wanted.clear()
        try:
            await self._threads.run("database", self.ledger.settle, entries, released)
        except Exception:
            self._entries[:0], self._released[:0] = entries, released
            self._wanted.set()
            raise
        finally:
            if written is not None and not written.done():
                written.set_result(None)

    async def _sweep(self) -> None:
        try:
            await self._threads.run("database", self.ledger.sweep)
        except StorageFailure as error:
            log.error("reservations_not_swept", error=type(error).__name__)

    def _want(self) -> asyncio.Future[None]:
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        self._wanted.set()
        return self._written


def unexpected(error: Exception) -> Exception | None:
    """For the log, which shows where it came from."""
    return None if isinstance(error, StorageFailure) else error
