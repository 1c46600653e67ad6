"""Bring published files to the models folder: from a folder, the hub client's cache, or the hub; in that order.

Every file is brought to a folder of its own first, continued where an earlier attempt stopped, and compared with the
digest the hub publishes. Only when all files of a repository are there and right are they put in place.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from weights.checkpoints import Repository
from weights.errors import FileMismatch, PullError
from weights.hub import download, manifest
from weights.hub.listing import BLOCK, Listing, Wanted, cache_of, digest_of, from_cache, from_folder, from_hub
from weights.progress import Advance, ProgressReporter

INCOMING = ".incoming"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to and where from. `revisions`, by repository's name, take the place of the repositories' own."""

    models_dir: Path
    revisions: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None
    offline: bool = False
    fast: bool = False


def pull(repository: Repository, plan: Plan, progress: ProgressReporter) -> Listing:
    """Bring one repository's files. Raises `PullError`; what was fetched so far is used by the next attempt."""
    with download.explained(repository):
        listing = listed(repository, plan)
    for wanted in listing.files:
        if (known := dict(repository.sha256).get(wanted.path, wanted.digest)) != wanted.digest:
            raise FileMismatch(f"{repository.name}: {wanted.path}", "sha256", known, wanted.digest)
    folder, incoming = plan.models_dir / repository.folder, plan.models_dir / INCOMING / repository.folder
    with room_explained(str(plan.models_dir)):
        incoming.mkdir(parents=True, exist_ok=True)
        known = manifest.read(folder)["files"]
        check_room(listing, folder, incoming, plan)
        advance_all = progress.start(repository.name, sum(wanted.size for wanted in listing.files))
        for wanted in listing.files:
            advance = advance_both(progress.start(wanted.path, wanted.size), advance_all)
            if in_place(folder / wanted.path, wanted, known) or verified_of(incoming, wanted).is_file():
                advance(wanted.size)
            else:
                with room_explained(wanted.path):
                    bring(repository, wanted, listing.commit, incoming, plan, advance)
        put_in_place(repository, listing, folder, incoming, known)
    return listing


def advance_both(first: Advance, second: Advance) -> Advance:
    """Advance a file's bar and the repository's together."""

    def advance(count: int) -> None:
        first(count)
        second(count)

    return advance


def listed(repository: Repository, plan: Plan) -> Listing:
    """The files, and what each must hash to."""
    wanted = plan.revisions.get(repository.name)
    revision = wanted or repository.revision
    if not plan.offline:
        return from_hub(repository, revision)
    if plan.source is None:
        return from_cache(repository, revision)
    listing = from_folder(repository, plan.source)
    if wanted not in (None, listing.commit):
        raise PullError(f"{repository.name}: {plan.source} has it at {listing.commit}, not at {wanted}")
    return listing


def in_place(file: Path, wanted: Wanted, known: dict[str, dict[str, str | int]]) -> bool:
    """Whether the file is there and right. One that an earlier pull wrote down is not read again."""
    if not file.is_file() or file.stat().st_size != wanted.size:
        return False
    entry = known.get(wanted.path, {})
    return wanted.digest in (entry.get("sha256"), entry.get("git")) or digest_of(file, wanted.digest) == wanted.digest


def bring(repository: Repository, wanted: Wanted, commit: str, incoming: Path, plan: Plan, advance: Advance) -> None:
    """One file, checked, to the incoming folder."""
    partial = partial_of(incoming, wanted)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if copy := local_copy(repository, wanted, commit, plan):
        take(copy, partial, advance)
    elif plan.offline:
        where = plan.source or "the hub client's cache"
        raise PullError(f"{wanted.path}: {where} does not have it in this size. Without --offline the hub is asked")
    else:
        with download.explained(repository, wanted.path):
            (download.fast if plan.fast else download.fetch)(repository, wanted, commit, partial, advance)
    try:
        check(partial, wanted)
    except FileMismatch:
        partial.unlink()
        raise
    partial.rename(verified_of(incoming, wanted))


def check(file: Path, wanted: Wanted) -> None:
    """Raises `FileMismatch` unless the file has the size and the digest that the hub publishes."""
    if (size := file.stat().st_size) != wanted.size:
        raise FileMismatch(wanted.path, "bytes:", wanted.size, size)
    if (found := digest_of(file, wanted.digest)) != wanted.digest:
        raise FileMismatch(wanted.path, "sha256" if len(found) == 64 else "git's id", wanted.digest, found)


def partial_of(incoming: Path, wanted: Wanted) -> Path:
    """Where a file grows. Another content never continues it."""
    return incoming / f"{wanted.path}.{wanted.digest[:12]}.partial"


def verified_of(incoming: Path, wanted: Wanted) -> Path:
    """Where a file waits for the others once it has been checked."""
    return partial_of(incoming, wanted).with_suffix(".verified")


def local_copy(repository: Repository, wanted: Wanted, commit: str, plan: Plan) -> Path | None:
    """A file of the right size in the mirror folder or in the hub client's cache."""
    places = [cache_of(repository, commit)]
    if plan.source:
        short = repository.name.partition("/")[2]
        places = [plan.source / part for part in (repository.folder, repository.name, short, "")] + places
    files = (place / wanted.path for place in places)
    return next((file for file in files if file.is_file() and file.stat().st_size == wanted.size), None)


def take(source: Path, target: Path, advance: Advance) -> None:
    """Copy from the beginning."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK):
            writer.write(block)
            advance(len(block))
        writer.flush()
        os.fsync(writer.fileno())


def check_room(listing: Listing, folder: Path, incoming: Path, plan: Plan) -> None:
    """Raises `PullError` before anything is fetched that the disk cannot take."""
    needed = 0
    for wanted in listing.files:
        placed, partial = folder / wanted.path, partial_of(incoming, wanted)
        if verified_of(incoming, wanted).is_file() or (placed.is_file() and placed.stat().st_size == wanted.size):
            continue
        needed += wanted.size - (partial.stat().st_size if partial.is_file() else 0)
    free = shutil.disk_usage(plan.models_dir).free
    if needed > free:
        largest = max(listing.files, key=lambda wanted: wanted.size)
        raise PullError(
            f"{plan.models_dir.absolute()}: {gigabytes(needed)} are needed (the largest file, {largest.path}, has "
            f"{gigabytes(largest.size)}) and {gigabytes(free)} free. Free some, or name another disk with --models-dir"
        )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


@contextmanager
def room_explained(what: str) -> Iterator[None]:
    """A disk that fills up meanwhile is `PullError` too."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PullError) or error.errno not in NO_ROOM:
            raise
        raise PullError(f"{what}: the disk is full. Free some space and pull again: it goes on from here") from error


def put_in_place(
    repository: Repository, listing: Listing, folder: Path, incoming: Path, known: dict[str, dict[str, str | int]]
) -> None:
    """Move every file to where it is served from, then write the manifest."""
    entries: dict[str, dict[str, str | int]] = {}
    for wanted in listing.files:
        target, fetched = folder / wanted.path, verified_of(incoming, wanted)
        if fetched.is_file():
            entries[wanted.path] = entry_of(fetched, wanted)
            target.parent.mkdir(parents=True, exist_ok=True)
            fetched.replace(target)
        else:
            entry = known.get(wanted.path, {})
            same = wanted.digest in (entry.get("sha256"), entry.get("git"))
            entries[wanted.path] = entry if same else entry_of(target, wanted)
    manifest.write(folder, repository, listing.commit, entries)
    shutil.rmtree(incoming)


def entry_of(file: Path, wanted: Wanted) -> dict[str, str | int]:
    """A file's entry in the manifest. Small files come with git's id; their sha256 is ours."""
    if len(wanted.digest) == 64:
        return {"size": wanted.size, "sha256": wanted.digest}
    return {"size": wanted.size, "sha256": digest_of(file, manifest.SHA256), "git": wanted.digest}
