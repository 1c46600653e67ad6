"""Digests of files, read block by block with progress."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 2**22  # bytes
SAMPLES, SAMPLE = 64, 2**16  # blocks of a file, and bytes of each, that stand for the whole
SHA256 = "0" * 64  # an example of that kind of digest, for `hash_file`


def hash_file(file: Path, like: str = SHA256, advance: Callable[[int], Any] = lambda _: None) -> str:
    """The file's digest of the same kind as `like`, in hexadecimal.

    64 digits: sha256 of the content, which the hub publishes for large files. 40 digits: git's id of the content, which
    it publishes for small ones. `advance` is called with the bytes of each block.
    """
    if len(like) == len(SHA256):
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def hash_sample(file: Path) -> str:
    """sha256, in hexadecimal, of the file's size and of blocks spread evenly over it, its first and last among them.

    Read in an instant from a file of any size. It tells another file from this one, and a damaged disk's zeros; a
    change between the blocks is not seen.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE)
    with file.open("rb") as source:
        for start in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
            source.seek(start)
            digest.update(source.read(SAMPLE))
    return digest.hexdigest()
