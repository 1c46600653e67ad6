"""`manifest.json` beside pulled files: where they came from, the size and sha256 of each, and the check against it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weights.checkpoints import CheckpointFiles, Repository
from weights.digests import SHA256, hash_file, hash_sample
from weights.durable_file import ORDINARY, write_durably
from weights.errors import PullError, WrongWeights
from weights.hub.listing import MANIFEST
from weights.progress import Advance
from weights.version import read_version


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; an empty one where there is none. Raises `PullError` where it cannot be read."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        return manifest | {"files": dict(manifest["files"])}
    except FileNotFoundError:
        return {"files": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PullError(f"{folder / MANIFEST} cannot be read ({error})") from error


def write(folder: Path, repository: Repository, commit: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Add `files` to the folder's manifest. Entries of another commit are dropped."""
    before = read(folder)
    entries = before["files"] if before.get("revision") == commit else {}
    manifest = {
        "repository": repository.name,
        "revision": commit,
        "licence": repository.licence.name,
        "tool": f"srpo-server {read_version()}",
        "files": dict(sorted((entries | dict(files)).items())),
    }
    write_durably(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode(), ORDINARY)


def find_problems(folder: Path, advance: Advance = lambda _: None, *, whole: bool = True) -> Iterator[str]:
    """A sentence for each file that differs from the manifest. Reads every byte if `whole`. Raises `PullError`."""
    for path, entry in read(folder)["files"].items():
        if not (folder / path).is_file():
            yield f"{folder / path}: missing"
        elif problem := find_problem(folder / path, entry, whole, advance):
            yield f"{folder / path}: {problem}"


def find_problem(file: Path, entry: Mapping[str, Any], whole: bool, advance: Advance = lambda _: None) -> str | None:
    """How a file differs from its entry: in size, and in all its bytes or, not `whole`, in a sample of them.

    Entries of an earlier version have no sample.
    """
    if (size := file.stat().st_size) != entry["size"]:
        return f"expected {entry['size']} bytes, found {size}"
    if whole and (digest := hash_file(file, SHA256, advance)) != entry["sha256"]:
        return f"expected sha256 {entry['sha256']}, found {digest}"
    if not whole and "sample" in entry and hash_sample(file) != entry["sample"]:
        return "it has changed since it was pulled"
    return None


def check_pulled(located: CheckpointFiles, whole: bool) -> None:
    """Compare the files that are there with what was pulled: sizes and samples, or every byte with `whole`.

    What was not pulled is taken as it is, and a file that is not needed may be missing. Raises `WrongWeights`,
    `PullError`.
    """
    if located.checkpoint.embedded:
        return
    for folder in {path for path in map(find_folder, (located.folder, located.transformer)) if path}:
        for path, entry in read(folder)["files"].items():
            if (folder / path).is_file() and (problem := find_problem(folder / path, entry, whole)):
                raise WrongWeights(folder / path, f"{problem}. Pull it again")


def find_folder(path: Path | None) -> Path | None:
    """The pulled folder that a file or folder of weights belongs to."""
    if path is None:
        return None
    return next((folder for folder in (path, path.parent) if is_pulled(folder)), None)


def is_pulled(folder: Path) -> bool:
    """Whether the folder has a manifest of ours, even a damaged one; other programs write files of this name too."""
    try:
        return "repository" in json.loads((folder / MANIFEST).read_text())
    except OSError:
        return False
    except (ValueError, TypeError):
        return True
