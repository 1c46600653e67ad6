"""What one client may take, so that others get theirs: unfinished requests, requests a minute, bytes of uploads.

Images a day are counted where usage is, in the database (`server.usage`).
"""

import asyncio
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from pipelines.workers.pool import WorkerPool
from server.errors import KeyLimitReached, KeyRateReached, UploadsFull
from server.process.threads import ThreadPools
from server.security.callers import Caller, Quota
from server.security.rates import RequestRates

RESERVED = 4  # one place of so many is kept for other keys, where no limit is set
FREE, RECOVERY = 20.0, 3.0  # failures, and seconds
LOADED_AFTER = 2.0  # seconds, about, for a source picture
MIN_WAIT = 0.25  # seconds
MAX_WAITING, MAX_ADDRESSES = 64, 10_000
UNCOUNTED = 2**16  # bytes of a body; with connections limited, those of all that are so small have a bound already


class KeyLimits:
    """What a key may ask for at a time and in a minute. A server without keys has one client, which has no limit.

    `defaults` are for keys that have no limit of their own.
    """

    def __init__(self, defaults: Quota, pool: WorkerPool, rates: RequestRates, threads: ThreadPools) -> None:
        self._requests = defaults.concurrent_requests or pool.capacity - pool.capacity // RESERVED
        self._rate = defaults.requests_per_minute
        self._images = defaults.images_per_day
        self._pool = pool
        self._rates = rates
        self._threads = threads
        self._loading: Counter[str] = Counter()  # source pictures, by whose they are

    def check(self, caller: Caller) -> None:
        """Raises `KeyLimitReached`, which says when one of the key's requests is predicted to end."""
        limit = caller.quota.concurrent_requests or self._requests
        jobs = self._pool.unfinished_of(caller.owner) if caller.owner else []
        if caller.owner and (unfinished := len(jobs) + self._loading[caller.owner]) >= limit:
            raise KeyLimitReached(unfinished, self._pool.estimate_end(jobs) if jobs else LOADED_AFTER)

    @contextmanager
    def loading(self, caller: Caller) -> Iterator[None]:
        """While a source picture of the caller's is fetched and decoded, which is an unfinished request too.

        Raises as `check` does.
        """
        self.check(caller)
        self._loading[caller.owner] += 1
        try:
            yield
        finally:
            self._loading[caller.owner] -= 1
            self._loading += Counter()  # forgets those that have none

    def images_per_day(self, caller: Caller) -> int | None:
        """How many images the caller may have in a day of UTC; None: any number."""
        return (caller.quota.images_per_day or self._images) if caller.owner else None

    async def count_request(self, caller: Caller) -> None:
        """One more request of the key's. Raises `KeyRateReached`, which says when the next may come."""
        per_minute = caller.quota.requests_per_minute or self._rate
        if not caller.owner or per_minute is None:
            return
        if self._rates.shared:
            wait = self._rates.cached_wait(caller.owner, per_minute)
            if wait is None:
                wait = await self._threads.run("rates", self._rates.take, caller.owner, per_minute)
        else:
            wait = self._rates.take(caller.owner, per_minute)
        if wait is not None:
            raise KeyRateReached(per_minute, wait)


class FailedKeys:
    """Holds back the refusal of a wrong key, longer with each that comes from the same address. Right keys never wait.

    A key cannot be guessed anyway, at 128 bits; this keeps those who try from filling the log and the loop. An address
    has `FREE` failures, one more after every `RECOVERY` seconds. Both the table and the number of those who wait are
    bounded: a refusal beyond them is immediate.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest  # seconds
        self._failures: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> failures, when that was
        self._waiting = 0

    async def hold_back(self, address: str) -> None:
        """Wait as long as one more failure from this address costs."""
        seconds = self.count(address, time.monotonic())
        if not seconds or self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._waiting -= 1

    def count(self, address: str, now: float) -> float:
        """Note a failure, at `now` on the monotonic clock. Returns the seconds to wait for it."""
        network = network_of(address)
        failures, before = self._failures.pop(network, (0.0, now))
        failures = max(0.0, failures - (now - before) / RECOVERY) + 1
        self._failures[network] = (failures, now)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
        excess = failures - FREE
        return min(self._longest, MIN_WAIT * 2 ** min(excess - 1, 10.0)) if excess > 0 else 0.0


def network_of(address: str) -> str:
    """The address, or the IPv6 network that one client usually has to itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address


class UploadBudget:
    """The bytes that the bodies of all requests in progress may take together, in memory and in temporary files."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.taken = 0

    def open(self) -> "Upload":
        """One request's share, to be closed when its body is no longer needed."""
        return Upload(self)

    def take(self, count: int) -> None:
        """Raises `UploadsFull`, and takes nothing, where that many bytes are not left."""
        if self.taken + count > self._size:
            raise UploadsFull
        self.taken += count

    def give_back(self, count: int) -> None:
        self.taken -= count


class Upload:
    """What one request's body takes of the budget. A small body takes nothing, so it finds room when all is taken."""

    def __init__(self, budget: UploadBudget) -> None:
        self._budget = budget
        self._received = 0
        self._taken = 0

    def add(self, count: int) -> None:
        """`count` bytes have come. Raises `UploadsFull`: they must be dropped."""
        self._received += count
        if self._received > UNCOUNTED:
            more = self._received - self._taken
            self._budget.take(more)
            self._taken += more

    def close(self) -> None:
        """Give all back. May be called again."""
        self._budget.give_back(self._taken)
        self._taken = self._received = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
