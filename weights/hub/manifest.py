"""`manifest.json` beside pulled files: where they came from, the size and sha256 of each, and the check against it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weights.checkpoints import CheckpointFiles, Repository
from weights.digests import SHA256, hash_file, hash_sample
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
    temporary = folder / f"{MANIFEST}.partial"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(folder / MANIFEST)


def find_problems(folder: Path, advance: Advance = lambda _: None) -> Iterator[str]:
    """A sentence for each file that differs from the manifest. Reads every byte. Raises `PullError`."""
    for path, entry in read(folder)["files"].items():
        file = folder / path
        if not file.is_file():
            yield f"{file}: missing"
            continue
        if (size := file.stat().st_size) != entry["size"]:
            yield f"{file}: expected {entry['size']} bytes, found {size}"
            continue
        if (digest := hash_file(file, SHA256, advance)) != entry["sha256"]:
            yield f"{file}: expected sha256 {entry['sha256']}, found {digest}"


def check_pulled(located: CheckpointFiles, whole: bool) -> None:
    """Compare the files that will be loaded with what was pulled: sizes and samples, or every byte with `whole`.

    Folders without a manifest were not pulled, and are taken as they are. Raises `WrongWeights`, `PullError`.
    """
    if located.checkpoint.embedded:
        return
    for folder in {path for path in map(find_folder, (located.folder, located.transformer)) if path}:
        for problem in find_problems(folder) if whole else find_changes(folder):
            raise WrongWeights(folder, f"it is not what was pulled: {problem}. Pull it again")


def find_folder(path: Path | None) -> Path | None:
    """The folder with a manifest that a file or folder of weights belongs to."""
    if path is None:
        return None
    return next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None)


def find_changes(folder: Path) -> Iterator[str]:
    """A sentence for each file of another size or sample than in the manifest; an older one has sizes only."""
    for path, entry in read(folder)["files"].items():
        file = folder / path
        if not file.is_file():
            yield f"{path} is missing"
        elif (size := file.stat().st_size) != entry["size"]:
            yield f"{path} has {size} bytes instead of {entry['size']}"
        elif "sample" in entry and hash_sample(file) != entry["sample"]:
            yield f"{path} has changed"
