"""Which files a pull fetches, with the size and digest of each: from the hub, a manifest, or the hub client's cache.

The kinds of digest are explained at `weights.digests.hash_file`. A repository that lacks a file which serving needs is
refused before anything is fetched.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from weights.checkpoints import Repository
from weights.errors import PullError
from weights.manifest import MANIFEST, read_manifest

LICENCE_PATTERN = "LICENSE*"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to fetch: its path in the repository, its size in bytes, its digest."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository that serving needs, at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


def list_hub(repository: Repository, revision: str) -> Listing:
    """The files that the hub lists now. Raises the hub client's errors, and `PullError`."""
    from huggingface_hub import HfApi  # seconds to import, and only a pull needs it

    info = HfApi().model_info(repository.name, revision=revision, files_metadata=True)
    files = [
        RemoteFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "")
        for sibling in info.siblings or ()
    ]
    return Listing(info.sha or revision, select_files(repository, files, "the hub"))


def list_folder(repository: Repository, folder: Path) -> Listing:
    """The files that the manifest of an earlier pull lists. Raises `PullError`, `BrokenManifest`."""
    file = folder / repository.folder / MANIFEST
    if (manifest := read_manifest(file.parent)) is None:
        raise PullError(
            f"{file}: there is no manifest to check the files against. Without a hub, {folder} must be a models folder "
            "that `srpo weights pull` has filled"
        )
    files = [RemoteFile(path, entry.size, entry.sha256) for path, entry in manifest.files.items()]
    return Listing(manifest.revision, select_files(repository, files, str(file)))


def list_cache(repository: Repository, revision: str) -> Listing:
    """The files in the hub client's cache, where each blob's name is its digest. Raises `PullError`."""
    snapshot = cache_folder(repository, revision)
    files = [
        RemoteFile(file.relative_to(snapshot).as_posix(), file.stat().st_size, file.resolve().name)
        for file in (snapshot.rglob("*") if snapshot.is_dir() else ())
        if file.is_symlink() and file.is_file()
    ]
    if not files:
        raise PullError(f"{snapshot}: the hub client's cache does not hold {repository.name} at {revision}")
    return Listing(snapshot.name, select_files(repository, files, str(snapshot)))


def cache_folder(repository: Repository, revision: str) -> Path:
    """The folder in which the hub client's cache keeps a revision, whether it exists or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repository.name.replace('/', '--')}"
    ref = folder / "refs" / revision
    return folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)


def select_files(repository: Repository, available: Iterable[RemoteFile], origin: str) -> tuple[RemoteFile, ...]:
    """The files that serving needs, and the licence.

    Raises `PullError` when a pattern matches nothing, and for a path that leads out of the repository's folder.
    """
    files = sorted(available, key=lambda file: file.path)
    for file in files:
        if (path := PurePosixPath(file.path)).is_absolute() or ".." in path.parts:
            raise PullError(f"{repository.name}: {origin} lists {file.path!r}, which leads out of the folder")
    for pattern in repository.files:
        if not any(fnmatch(file.path, pattern) for file in files):
            raise PullError(f"{repository.name}: {origin} has no {pattern}, which serving needs")
    return tuple(
        file for file in files if any(fnmatch(file.path, pattern) for pattern in (*repository.files, LICENCE_PATTERN))
    )
