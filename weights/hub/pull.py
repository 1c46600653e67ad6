"""Fetches published files into the models folder: from a local folder, the hub client's cache, or the hub.

Each file first goes to a separate folder, where an interrupted download is resumed, and is compared with the digest
that the hub publishes. The files of a repository move to their final place only when all are complete and correct.
"""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from weights.checkpoints import Repository
from weights.digests import BLOCK, hash_file, hash_sample
from weights.durable_file import sync_folder
from weights.errors import FileMismatch, PullError
from weights.hub import download, manifest
from weights.hub.listing import Listing, RemoteFile, cache_folder, list_cache, list_folder, list_hub
from weights.manifest import ManifestFile
from weights.progress import Advance, ProgressReporter

INCOMING = ".incoming"
COPY = ".copy"  # the suffix of a file that is being copied from this machine
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class PullOptions:
    """Where to fetch to, and from where. `revisions`, by the repository's name, replace the repositories' own."""

    models_dir: Path
    revisions: Mapping[str, str] = field(default_factory=dict)
    source: Path | None = None
    offline: bool = False
    fast: bool = False


def pull(repository: Repository, options: PullOptions, progress: ProgressReporter) -> Listing:
    """Fetch one repository's files. Raises `PullError`, `BrokenManifest`.

    The next attempt uses what was fetched so far.
    """
    with download.translate_hub_errors(repository):
        listing = list_files(repository, options)
    for file in listing.files:
        if (expected := dict(repository.sha256).get(file.path, file.digest)) != file.digest:
            raise FileMismatch(f"{repository.name}: {file.path}", "sha256", expected, file.digest)
    folder, incoming = options.models_dir / repository.folder, options.models_dir / INCOMING / repository.folder
    with translate_full_disk(str(options.models_dir)):
        incoming.mkdir(parents=True, exist_ok=True)
        known = manifest.read_before_pull(folder)
        for killed in incoming.rglob(f"*{COPY}"):
            killed.unlink()
        check_disk_space(listing, folder, incoming, options)
        advance_all = progress.start(repository.name, sum(file.size for file in listing.files))
        for file in listing.files:
            advance = advance_both(progress.start(file.path, file.size), advance_all)
            if verified_path(incoming, file).is_file():
                advance(file.size)
            elif not is_in_place(folder / file.path, file, advance):
                with translate_full_disk(file.path):
                    fetch_file(repository, file, listing.commit, incoming, options, advance)
        install_files(repository, listing, folder, incoming, known)
    return listing


def advance_both(first: Advance, second: Advance) -> Advance:
    """Advance a file's bar and the repository's together."""

    def advance(count: int) -> None:
        first(count)
        second(count)

    return advance


def list_files(repository: Repository, options: PullOptions) -> Listing:
    """The files to fetch, with the digest of each. Raises `PullError` and the hub client's errors."""
    pinned = options.revisions.get(repository.name)
    revision = pinned or repository.revision
    if not options.offline:
        return list_hub(repository, revision)
    if options.source is None:
        return list_cache(repository, revision)
    listing = list_folder(repository, options.source)
    if pinned not in (None, listing.commit):
        raise PullError(f"{repository.name}: {options.source} has it at {listing.commit}, not at {pinned}")
    return listing


def is_in_place(path: Path, file: RemoteFile, advance: Advance) -> bool:
    """Whether the correct file is there. It is read: what an earlier pull wrote down says nothing of it today."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if hash_file(path, file.digest, advance) == file.digest:
        return True
    advance(-file.size)
    return False


def fetch_file(
    repository: Repository, file: RemoteFile, commit: str, incoming: Path, options: PullOptions, advance: Advance
) -> None:
    """Bring one file into the incoming folder and verify it: from this machine where it has it, else from the hub."""
    partial = partial_path(incoming, file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if not copy_verified(repository, file, commit, partial, options, advance):
        download_verified(repository, file, commit, partial, options, advance)
    partial.rename(verified_path(incoming, file))


def copy_verified(
    repository: Repository, file: RemoteFile, commit: str, partial: Path, options: PullOptions, advance: Advance
) -> bool:
    """Copy a file to `partial` from this machine. Returns whether there was a correct one.

    Offline, raises `PullError` where there was none.
    """
    wrong: FileMismatch | None = None
    copied = partial.with_suffix(COPY)  # a download that was begun stays
    for copy in find_local_copies(repository, file, commit, options):
        try:
            copy_file(copy, copied, advance)
            verify_file(copied, file)
            copied.replace(partial)
            return True
        except FileMismatch as error:
            wrong = error
            advance(-file.size)
        finally:
            copied.unlink(missing_ok=True)
    if options.offline:
        where = options.source or "the hub client's cache"
        missing = f"{file.path}: {where} does not have it in this size. Without --offline the hub is asked"
        raise wrong or PullError(missing)
    return False


def download_verified(
    repository: Repository, file: RemoteFile, commit: str, partial: Path, options: PullOptions, advance: Advance
) -> None:
    """Download a file to `partial`. Raises `FileMismatch` and `PullError`.

    One that came in pieces and is wrong is fetched once more: a piece may have been a proxy's page.
    """
    transfer = download.download_fast if options.fast else download.download_http
    for last in (False, True):
        with download.translate_hub_errors(repository, file.path):
            pieced = transfer(repository, file, commit, partial, advance)
        try:
            verify_file(partial, file)
            break
        except FileMismatch:
            partial.unlink()
            if last or not pieced:
                raise
            advance(-file.size)


def verify_file(path: Path, file: RemoteFile) -> None:
    """Raises `FileMismatch` unless the file has the size and the digest that the hub publishes."""
    if (size := path.stat().st_size) != file.size:
        raise FileMismatch(file.path, "bytes:", file.size, size)
    if (digest := hash_file(path, file.digest)) != file.digest:
        raise FileMismatch(file.path, "sha256" if len(digest) == 64 else "git's id", file.digest, digest)


def partial_path(incoming: Path, file: RemoteFile) -> Path:
    """Where a download is collected. The digest in the name keeps another content from resuming it."""
    return incoming / f"{file.path}.{file.digest[:12]}.partial"


def verified_path(incoming: Path, file: RemoteFile) -> Path:
    """Where a verified file waits for the others of its repository."""
    return partial_path(incoming, file).with_suffix(".verified")


def find_local_copies(repository: Repository, file: RemoteFile, commit: str, options: PullOptions) -> Iterator[Path]:
    """Each file of the right size in the local folder and in the hub client's cache."""
    places = [cache_folder(repository, commit)]
    if options.source:
        short = repository.name.partition("/")[2]
        places = [options.source / part for part in (repository.folder, repository.name, short, "")] + places
    for copy in (place / file.path for place in places):
        if copy.is_file() and copy.stat().st_size == file.size:
            yield copy


def copy_file(source: Path, target: Path, advance: Advance) -> None:
    """Copy the whole file, with progress."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK):
            writer.write(block)
            advance(len(block))
        writer.flush()
        os.fsync(writer.fileno())


def check_disk_space(listing: Listing, folder: Path, incoming: Path, options: PullOptions) -> None:
    """Raise `PullError`, before anything is fetched, if the disk has too little space."""
    needed = 0
    for file in listing.files:
        placed, partial = folder / file.path, partial_path(incoming, file)
        if verified_path(incoming, file).is_file() or (placed.is_file() and placed.stat().st_size == file.size):
            continue
        needed += file.size - (partial.stat().st_size if partial.is_file() else 0)
    free = shutil.disk_usage(options.models_dir).free
    if needed > free:
        largest = max(listing.files, key=lambda file: file.size)
        raise PullError(
            f"{options.models_dir.absolute()}: {gigabytes(needed)} are needed (the largest file, {largest.path}, has "
            f"{gigabytes(largest.size)}) and {gigabytes(free)} free. Free some, or name another disk with --models-dir"
        )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


@contextmanager
def translate_full_disk(what: str) -> Iterator[None]:
    """Turn the errors of a disk that is full into `PullError`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PullError) or error.errno not in DISK_FULL:
            raise
        raise PullError(f"{what}: the disk is full. Free some space and pull again: it goes on from here") from error


def install_files(
    repository: Repository, listing: Listing, folder: Path, incoming: Path, known: manifest.Entries
) -> None:
    """Move every file to its final place, then write the manifest."""
    entries: dict[str, ManifestFile] = {}
    for file in listing.files:
        target, fetched = folder / file.path, verified_path(incoming, file)
        if fetched.is_file():
            entries[file.path] = manifest_entry(fetched, file)
            target.parent.mkdir(parents=True, exist_ok=True)
            fetched.replace(target)
            sync_folder(target.parent)
        else:
            entry = known.get(file.path)
            reusable = entry and entry.sample and entry.has_digest(file.digest)
            entries[file.path] = entry if entry and reusable else manifest_entry(target, file)
    manifest.record(folder, repository, listing.commit, entries)
    shutil.rmtree(incoming)


def manifest_entry(path: Path, file: RemoteFile) -> ManifestFile:
    """A file's entry in the manifest. The hub publishes only git's id of small files; their sha256 is computed here."""
    if len(file.digest) == 64:
        return ManifestFile(file.size, file.digest, hash_sample(path))
    return ManifestFile(file.size, hash_file(path), hash_sample(path), git=file.digest)
