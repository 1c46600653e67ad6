"""A transformer in another form: read tensor by tensor, written as it goes, put in place only when it is whole.

Memory is bounded by the largest tensor, not by the file. Beside the new file stands a manifest: what it was made from.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from weights.errors import CannotConvert
from weights.formats.architecture import Geometry
from weights.formats.detect import Match, check, match, nearest
from weights.formats.headers import read_header
from weights.formats.read import Source
from weights.formats.write import LAYOUTS, Layout, Stored
from weights.progress import ProgressReporter

BLOCK = 2**22
MANIFEST = ".manifest.json"  # behind the file's whole name


@dataclass(frozen=True, slots=True)
class Made:
    """The new file, its size in bytes, and its sha256."""

    path: Path
    size: int
    sha256: str


def convert(source: Path, layout: str, target: Path, revision: str | None, progress: ProgressReporter) -> Made:
    """Write `target` in a row of `LAYOUTS`. Raises `WeightsError`; then nothing is at `target`."""
    header = read_header(source)
    geometry = nearest(header).geometry
    found = match(header, geometry)
    check(source, found)
    row = LAYOUTS[layout]
    plan = row.plan(geometry)
    check_target(source, target, sum(stored.size for stored in plan.values()))
    files = sorted({tensor.file for tensor in header.tensors.values()})
    digests = {file.name: digest_of(file, progress) for file in files}
    partial = target.with_name(f"{target.name}.partial")
    facts = {"source": str(source.name), "files": digests, "revision": revision or revision_of(source)}
    facts |= {"dtype": layout, "tool": f"srpo-server {version('srpo-server')}"}
    try:
        write(found, geometry, row, plan, partial, facts, progress)
        made = Made(target, partial.stat().st_size, digest_of(partial, progress))
        note = target.with_name(target.name + MANIFEST)
        note_partial = note.with_name(f"{note.name}.partial")
        note_partial.write_text(json.dumps(facts | {"size": made.size, "sha256": made.sha256}, indent=1) + "\n")
        note_partial.replace(note)
        partial.replace(target)
    except OSError as error:
        raise CannotConvert(target, f"{error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return made


def check_target(source: Path, target: Path, size: int) -> None:
    """Raises `CannotConvert` before any work is done."""
    if target.exists():
        raise CannotConvert(target, "it exists already; name another file, or move it away")
    if not target.parent.is_dir():
        raise CannotConvert(target, f"there is no folder {target.parent}")
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise CannotConvert(target, f"{source} becomes {size:,} bytes, and only {free:,} are free there")


def write(
    found: Match,
    geometry: Geometry,
    layout: Layout,
    plan: Mapping[str, Stored],
    file: Path,
    facts: Mapping[str, Any],
    progress: ProgressReporter,
) -> None:
    advance = progress.start(f"writing {file.name}", sum(stored.size for stored in plan.values()))
    with Source(found) as source:

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in layout.make(geometry, source.read):
                yield name, tensor
                advance(plan[name].size)

        layout.save(file, plan, values(), {"manifest": json.dumps(facts)})
    with file.open("rb") as written:
        os.fsync(written.fileno())


def digest_of(file: Path, progress: ProgressReporter) -> str:
    """sha256 of a file."""
    advance = progress.start(f"sha256 of {file.name}", file.stat().st_size)
    total = hashlib.sha256()
    with file.open("rb") as source:
        while block := source.read(BLOCK):
            total.update(block)
            advance(len(block))
    return total.hexdigest()


def revision_of(source: Path) -> str | None:
    """The revision that the manifest of a pull beside the file names, if there is one."""
    manifest = (source if source.is_dir() else source.parent) / "manifest.json"
    try:
        revision: str | None = json.loads(manifest.read_text()).get("revision")
        return revision
    except (OSError, ValueError, AttributeError):
        return None
