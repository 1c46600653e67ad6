"""Digests of files, read block by block with progress."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 2**22  # bytes
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
