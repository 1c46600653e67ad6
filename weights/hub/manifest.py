"""What was pulled to a folder, kept in its manifest, and the check of the files against it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from weights.checkpoints import CheckpointFiles, Repository
from weights.digests import SHA256, hash_file, hash_sample
from weights.errors import PullError, WrongWeights
from weights.manifest import MANIFEST, Manifest, ManifestFile, read_manifest, write_manifest
from weights.progress import Advance
from weights.version import read_version

Entries = Mapping[str, ManifestFile]  # by the path in the repository


def read_entries(folder: Path) -> Entries:
    """What was pulled to a folder; nothing where it has no manifest of ours. Raises `BrokenManifest`."""
    manifest = read_manifest(folder)
    return manifest.files if manifest else {}


def read_before_pull(folder: Path) -> Entries:
    """As `read_entries`. Raises `PullError` where another program's file has the manifest's place."""
    if (folder / MANIFEST).exists() and read_manifest(folder) is None:
        raise PullError(f"{folder / MANIFEST} is another program's: move it away, and pull again")
    return read_entries(folder)


def record(folder: Path, repository: Repository, commit: str, files: Entries) -> None:
    """Add `files` to the folder's manifest. Entries of another commit are dropped."""
    before = read_manifest(folder)
    kept = before.files if before and before.revision == commit else {}
    tool = f"srpo-server {read_version()}"
    write_manifest(folder, Manifest(repository.name, commit, repository.licence.name, tool, {**kept, **files}))


def find_problems(folder: Path, advance: Advance = lambda _: None, *, whole: bool = True) -> Iterator[str]:
    """A sentence for each file that differs from the manifest. Reads every byte if `whole`. Raises `BrokenManifest`."""
    if (manifest := read_manifest(folder)) is None:
        yield f"{folder / MANIFEST}: not there, or another program's"
        return
    for path, entry in manifest.files.items():
        if not (folder / path).is_file():
            yield f"{folder / path}: missing"
        elif problem := find_problem(folder / path, entry, whole, advance):
            yield f"{folder / path}: {problem}"


def find_problem(file: Path, entry: ManifestFile, whole: bool, advance: Advance = lambda _: None) -> str | None:
    """How a file differs from its entry: in size, and in all its bytes or, not `whole`, in a sample of them."""
    if (size := file.stat().st_size) != entry.size:
        return f"expected {entry.size} bytes, found {size}"
    if whole and (digest := hash_file(file, SHA256, advance)) != entry.sha256:
        return f"expected sha256 {entry.sha256}, found {digest}"
    if not whole and entry.sample and hash_sample(file) != entry.sample:
        return "it has changed since it was pulled"
    return None


def check_pulled(located: CheckpointFiles, whole: bool) -> None:
    """Compare the files that are there with what was pulled: sizes and samples, or every byte with `whole`.

    What was not pulled is taken as it is, and a file that is not needed may be missing. Raises `WrongWeights`,
    `BrokenManifest`.
    """
    if located.checkpoint.embedded:
        return
    for folder in {path for path in map(find_folder, (located.folder, located.transformer)) if path}:
        for path, entry in read_entries(folder).items():
            if (folder / path).is_file() and (problem := find_problem(folder / path, entry, whole)):
                raise WrongWeights(folder / path, f"{problem}. Pull it again")


def find_folder(path: Path | None) -> Path | None:
    """The pulled folder that a file or folder of weights belongs to. Raises `BrokenManifest`."""
    if path is None:
        return None
    return next((folder for folder in (path, path.parent) if read_manifest(folder)), None)
