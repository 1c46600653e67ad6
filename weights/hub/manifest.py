"""`manifest.json` beside pulled files: where they came from, and the sha256 of each; and the check against it."""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from weights.checkpoints import Repository
from weights.errors import PullError
from weights.hub.listing import MANIFEST, digest_of

SHA256 = "0" * 64  # the kind of digest that manifests keep


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
    """Add `files` to the folder's manifest. Those of another commit are forgotten."""
    before = read(folder)
    kept = before["files"] if before.get("revision") == commit else {}
    manifest = {
        "repository": repository.name,
        "revision": commit,
        "licence": repository.licence.name,
        "tool": f"srpo-server {version('srpo-server')}",
        "files": dict(sorted((kept | dict(files)).items())),
    }
    temporary = folder / f"{MANIFEST}.partial"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(folder / MANIFEST)


def problems(folder: Path, report: Callable[[int], Any] = lambda _: None) -> Iterator[str]:
    """What differs from the manifest, a sentence a file. Reads every byte."""
    for path, entry in read(folder)["files"].items():
        file = folder / path
        if not file.is_file():
            yield f"{file}: missing"
            continue
        if (size := file.stat().st_size) != entry["size"]:
            yield f"{file}: expected {entry['size']} bytes, found {size}"
            continue
        if (found := digest_of(file, SHA256, report)) != entry["sha256"]:
            yield f"{file}: expected sha256 {entry['sha256']}, found {found}"
