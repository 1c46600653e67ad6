"""Converts a transformer to another format, tensor by tensor: memory is bounded by the largest tensor, not by the file.

The new file gets its name only when it is complete; an error leaves nothing behind. A manifest beside it says what it
was made from.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from weights.digests import SHA256, hash_file
from weights.durable_file import ORDINARY, sync_folder, write_durably
from weights.errors import ConversionError
from weights.formats.detect import TensorMatch, match_tensors, nearest_architecture, require_match
from weights.formats.headers import read_header
from weights.formats.output_formats import OUTPUT_FORMATS
from weights.formats.read import TensorReader
from weights.formats.write import FormatWriter, OutputTensor
from weights.manifest import read_manifest
from weights.progress import ProgressReporter
from weights.version import read_version

MANIFEST_SUFFIX = ".manifest.json"  # appended to the file's whole name


@dataclass(frozen=True, slots=True)
class ConvertedFile:
    """A new file, its size in bytes, and its sha256."""

    path: Path
    size: int
    sha256: str


def convert(source: Path, to: str, target: Path, revision: str | None, progress: ProgressReporter) -> ConvertedFile:
    """Write `source` to `target` in the format `to`, a key of `OUTPUT_FORMATS`. Raises `WeightsError`, and then
    leaves no new file behind.
    """
    header = read_header(source)
    config = nearest_architecture(header).config
    match = match_tensors(header, config)
    require_match(source, match)
    writer: FormatWriter = resolve_name(OUTPUT_FORMATS[to].writer)
    tensors = list(writer.list_tensors(config))
    check_target(source, target, sum(tensor.size for tensor in tensors))
    files = sorted({tensor.file for tensor in header.tensors.values()})
    digests = {file.name: _hash_with_progress(file, progress) for file in files}
    partial = target.with_name(f"{target.name}.partial")
    manifest: dict[str, Any] = {
        "source": str(source.name),
        "files": digests,
        "revision": revision or read_revision(source),
    }
    manifest |= {"dtype": to, "tool": f"srpo-server {read_version()}"}
    try:
        write_file(match, writer, tensors, partial, manifest, progress)
        converted = ConvertedFile(target, partial.stat().st_size, _hash_with_progress(partial, progress))
        manifest_file = target.with_name(target.name + MANIFEST_SUFFIX)
        manifest |= {"size": converted.size, "sha256": converted.sha256}
        write_durably(manifest_file, (json.dumps(manifest, indent=1) + "\n").encode(), ORDINARY)
        partial.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise ConversionError(target, f"{error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return converted


def check_target(source: Path, target: Path, size: int) -> None:
    """Raises `ConversionError` before any work is done."""
    if target.exists():
        raise ConversionError(target, "it exists already; name another file, or move it away")
    if not target.parent.is_dir():
        raise ConversionError(target, f"there is no folder {target.parent}")
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise ConversionError(target, f"{source} becomes {size:,} bytes, and only {free:,} are free there")


def write_file(
    match: TensorMatch,
    writer: FormatWriter,
    tensors: Sequence[OutputTensor],
    file: Path,
    manifest: Mapping[str, Any],
    progress: ProgressReporter,
) -> None:
    advance = progress.start(f"writing {file.name}", sum(tensor.size for tensor in tensors))
    with TensorReader(match) as reader:

        def make_tensors() -> Iterator[torch.Tensor]:
            for tensor in tensors:
                yield tensor.make(reader.read)
                advance(tensor.size)

        writer.save(file, tensors, make_tensors(), {"manifest": json.dumps(manifest)})
    with file.open("rb") as stored:
        os.fsync(stored.fileno())


def _hash_with_progress(file: Path, progress: ProgressReporter) -> str:
    return hash_file(file, SHA256, progress.start(f"sha256 of {file.name}", file.stat().st_size))


def read_revision(source: Path) -> str | None:
    """The revision that a pull wrote down beside the file; None where none did. Raises `BrokenManifest`."""
    manifest = read_manifest(source if source.is_dir() else source.parent)
    return manifest.revision if manifest else None
