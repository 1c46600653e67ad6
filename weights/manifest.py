"""`manifest.json` beside pulled files: the repository and commit that they came from, the size and digests of each.

Other programs write files of this name too: one that names no repository is not ours, and is left alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weights.durable_file import ORDINARY, write_durably
from weights.errors import BrokenManifest

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file: its size in bytes, and its digests.

    `sample` is that of `hash_sample`, which earlier versions did not write; `git` is git's id of a small file.
    """

    size: int
    sha256: str
    sample: str | None = None
    git: str | None = None

    def has_digest(self, digest: str) -> bool:
        """Whether the hub's digest of a file, of either kind, is this one's."""
        return digest in (self.sha256, self.git)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was pulled to a folder. `files` are by the path in it."""

    repository: str
    revision: str
    licence: str
    tool: str
    files: Mapping[str, ManifestFile]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none of ours. Raises `BrokenManifest`."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text())
        return parse_manifest(content) if "repository" in content else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenManifest(file, f"{type(error).__name__}: {error}") from error


def parse_manifest(content: Mapping[str, Any]) -> Manifest:
    """Raises `KeyError`, `TypeError` or `AttributeError` for what is no manifest."""
    return Manifest(
        repository=read_text(content, "repository"),
        revision=read_text(content, "revision"),
        licence=read_text(content, "licence"),
        tool=read_text(content, "tool"),
        files={path: parse_file(entry) for path, entry in content["files"].items()},
    )


def parse_file(entry: Mapping[str, Any]) -> ManifestFile:
    size = entry["size"]
    if type(size) is not int:
        raise TypeError(f"expected a number of bytes, found {size!r:.40}")
    optional = {name: read_text(entry, name) for name in ("sample", "git") if name in entry}
    return ManifestFile(size, read_text(entry, "sha256"), **optional)


def read_text(entry: Mapping[str, Any], name: str) -> str:
    text = entry[name]
    if not isinstance(text, str):
        raise TypeError(f"expected a text as {name}, found {text!r:.40}")
    return text


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Written so that no crash leaves half a manifest."""
    content = asdict(manifest)
    content["files"] = {
        path: {name: value for name, value in entry.items() if value is not None}
        for path, entry in sorted(content["files"].items())
    }
    write_durably(folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode(), ORDINARY)
