"""Where the images and records of a batch are, when many machines draw it: below a prefix of an S3 bucket.

Requests are drawn in parts. A part's record is written when its requests have ended, and says which were drawn: of
what, with which seed, into which files. Whoever gets the part again draws only what is not in it. Pictures have the
names of their lines, so that whoever draws a line again puts the same bytes in the same place.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog

from server.errors import StoreUnavailable
from server.images.stores.s3 import open_bucket
from server.process.backoff import pauses

FOLDER = "requests/"  # of the records, below the prefix
FAILURES = "failures.jsonl"
PATIENCE = 600.0  # seconds for which a bucket that refuses is tried: the work of hours waits for it
PAUSE, MAX_PAUSE = 0.1, 5.0  # seconds between tries
R = TypeVar("R")
log = structlog.get_logger("srpo")


class BatchBucket:
    """What is below `url`, `s3://BUCKET/PREFIX`. Safe to use from several threads.

    Raises `ValueError` where it cannot be used; the methods `StoreUnavailable` where it refuses for too long.
    """

    def __init__(self, url: str, endpoint: str | None, environment: Mapping[str, str]) -> None:
        self._obstore, self._bucket = open_bucket(url, endpoint, environment)

    def put(self, name: str, data: bytes | Path, content_type: str) -> None:
        """An object in the place of what had this name."""
        attributes = {"Content-Type": content_type}
        self._insist(lambda: self._obstore.put(self._bucket, name, data, attributes=attributes))

    def read_part(self, first: int) -> list[dict[str, Any]]:
        """What is written down of the part that begins with this request."""
        data = self._insist(lambda: self._read(name_part(first)))
        return [json.loads(line) for line in data.splitlines()]

    def write_part(self, first: int, records: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        self.put(name_part(first), text.encode(), "application/jsonl")

    def write_failures(self, file: Path) -> None:
        """Put what failed beside the images; nothing, where nothing did."""
        if file.stat().st_size:
            self.put(FAILURES, file, "application/jsonl")
        else:
            self._insist(lambda: self._obstore.delete(self._bucket, FAILURES))

    def _read(self, name: str) -> bytes:
        try:
            return bytes(self._obstore.get(self._bucket, name).bytes())
        except FileNotFoundError:
            return b""

    def _insist(self, call: Callable[[], R]) -> R:
        end, waits = time.monotonic() + PATIENCE, pauses(PAUSE, MAX_PAUSE)
        while True:
            try:
                return call()
            except FileNotFoundError as error:
                raise ValueError("there is no such bucket") from error
            except self._obstore.exceptions.BaseError as error:
                log.warning("batch_bucket", error=type(error).__name__)
                pause = next(waits)
                if time.monotonic() + pause > end:
                    raise StoreUnavailable from error
            time.sleep(pause)


def name_part(first: int) -> str:
    return f"{FOLDER}{first:07d}.jsonl"
