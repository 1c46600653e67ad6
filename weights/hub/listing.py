"""Which files a pull brings, and what each must be: as the hub says now, or as it once said.

A digest of 64 hexadecimal digits is the sha256 of a file's content (what the hub keeps for large files); one of 40 is
git's own id of the content (small files).
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from weights.checkpoints import Repository
from weights.errors import PullError

MANIFEST = "manifest.json"
BLOCK = 2**22
LICENCE = "LICENSE*"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to bring: its path in the repository, its size in bytes, its digest."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository that serving needs, at one commit."""

    commit: str
    files: tuple[Wanted, ...]


def from_hub(repository: Repository, revision: str) -> Listing:
    """As the hub lists them now. Raises the hub client's errors, and `PullError`."""
    from huggingface_hub import HfApi  # seconds to import, and only a pull needs it

    info = HfApi().model_info(repository.name, revision=revision, files_metadata=True)
    found = [
        Wanted(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "")
        for sibling in info.siblings or ()
    ]
    return Listing(info.sha or revision, chosen(repository, found, "the hub"))


def from_folder(repository: Repository, folder: Path) -> Listing:
    """As the manifest of an earlier pull lists them. Raises `PullError`."""
    file = folder / repository.folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        found = [Wanted(path, entry["size"], entry["sha256"]) for path, entry in manifest["files"].items()]
        commit: str = manifest["revision"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PullError(
            f"{file}: there is no manifest to check the files against ({error}). Without a hub, {folder} must be a "
            "models folder that `srpo weights pull` has filled"
        ) from error
    return Listing(commit, chosen(repository, found, str(file)))


def from_cache(repository: Repository, revision: str) -> Listing:
    """As the hub client's cache holds them: its blobs bear their digests as names. Raises `PullError`."""
    snapshot = cache_of(repository, revision)
    found = [
        Wanted(file.relative_to(snapshot).as_posix(), file.stat().st_size, file.resolve().name)
        for file in (snapshot.rglob("*") if snapshot.is_dir() else ())
        if file.is_symlink() and file.is_file()
    ]
    if not found:
        raise PullError(f"{snapshot}: the hub client's cache does not hold {repository.name} at {revision}")
    return Listing(snapshot.name, chosen(repository, found, str(snapshot)))


def cache_of(repository: Repository, revision: str) -> Path:
    """Where the hub client's cache has a revision, if it has it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repository.name.replace('/', '--')}"
    named = folder / "refs" / revision
    return folder / "snapshots" / (named.read_text().strip() if named.is_file() else revision)


def chosen(repository: Repository, found: Iterable[Wanted], where: str) -> tuple[Wanted, ...]:
    """Of `found`, what serving needs. Raises `PullError` when a pattern matches nothing."""
    files = sorted(found, key=lambda wanted: wanted.path)
    for pattern in repository.files:
        if not any(fnmatch(wanted.path, pattern) for wanted in files):
            raise PullError(f"{repository.name}: {where} has no {pattern}, which serving needs")
    return tuple(w for w in files if any(fnmatch(w.path, pattern) for pattern in (*repository.files, LICENCE)))


def digest_of(file: Path, like: str, report: Callable[[int], Any] = lambda _: None) -> str:
    """The file's digest of the same kind as `like`. `report` hears of every block's bytes."""
    if len(like) == 64:
        total = hashlib.sha256()
    else:
        total = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            total.update(block)
            report(len(block))
    return total.hexdigest()
