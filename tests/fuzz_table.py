"""`make fuzz`: 100,000 requests drawn at random, over raw sockets to the real app, as a table (fewer: FUZZ=1000).

Fails where a reply is a 500, names something inside the server, or does not come, and where the log has a traceback.
Each failure is printed with the request. Another `SEED` draws other requests.
"""

import asyncio
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from support.instant import logged
from support.mutations import KINDS, Mutations, Request

COUNT, SEED = int(os.environ.get("FUZZ", "100000")), int(os.environ.get("SEED", "1"))
CLIENTS = 16
PATIENCE = 60.0  # seconds for a reply that must come
UNFRAMED = 0.5  # seconds for one that need not: the server may still wait for the rest of such a request
INSIDE = re.compile(rb"0x[0-9a-f]{6,}|Traceback|site-packages|\.py\b|sqlalchemy|pydantic", re.IGNORECASE)
STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
SHOWN = 2000  # bytes of a request
COLUMNS = ("requests", "number", "2xx", "3xx", "4xx", "503", "no reply")


async def ask(port: int, request: Request) -> bytes:
    """All that is answered until the server closes the connection, or patience ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = b""
    try:
        async with asyncio.timeout(PATIENCE if request.framed else UNFRAMED):
            writer.write(request.raw)
            while part := await reader.read(2**16):
                heard += part
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return heard


def judge(request: Request, heard: bytes) -> tuple[str, str | None]:
    """The column of a reply, and what is wrong with it."""
    statuses = [int(status) for status in STATUS.findall(heard.split(b"\r\n\r\n")[0])]
    if not statuses:
        return "no reply", "no reply" if request.framed else None
    status = statuses[0]
    if status >= 300 and (inside := INSIDE.search(heard)):
        return f"{status // 100}xx", f"a reply names {inside[0]!r}"
    if status == 503:
        return "503", None
    return f"{status // 100}xx", f"status {status}" if status >= 500 else None


async def run(port: int) -> tuple[dict[str, Counter[str]], Counter[str], list[str]]:
    """Counts by kind and column, counts of the codes of 503s, and failures."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    codes: Counter[str] = Counter()
    failures: list[str] = []
    mutations, kinds = Mutations(SEED), list(KINDS)
    numbers = iter(range(COUNT))

    async def work() -> None:
        for number in numbers:
            kind = kinds[number % len(kinds)]
            request = mutations.draw(kind)
            heard = await ask(port, request)
            column, wrong = judge(request, heard)
            counts[kind][column] += 1
            if column == "503":
                code = re.search(rb'"code": ?"(\w+)"', heard)
                codes[(code[1] if code else request.raw.split(b" HTTP")[0]).decode("latin-1")] += 1
            if wrong:
                failures.append(f"{wrong}: {request.raw[:SHOWN]!r}")
            if number and number % 5000 == 0:
                print(f"{number} ...", file=sys.stderr, flush=True)

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return counts, codes, failures


def main() -> int:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each request that is none
    with tempfile.TemporaryDirectory() as folder, logged(Path(folder)) as (_, url, entries):
        counts, codes, failures = asyncio.run(run(int(url.rpartition(":")[2])))
        failures += [f"in the log: {entry}"[:SHOWN] for entry in entries if entry.get("exc_info")]
    print("| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS), sep="\n")
    for kind, count in counts.items():
        print(f"| {kind} | {count.total()} | " + " | ".join(str(count[column]) for column in COLUMNS[2:]) + " |")
    print(f"\n503 by code: {dict(codes) or 'none'}", *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
