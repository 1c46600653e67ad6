"""`srpo doctor`: what stands and what is missing, on one screen, before the server is started. Imports no torch."""

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.errors import SafetyUnavailable
from pipelines.loading.placement import DoesNotFit, cards, holders, host_memory, place, placement_of
from server.cli.parsing import parse
from server.cli.serve import listen
from server.security.keys import KeyRing
from server.settings import Settings
from server.state import build_guard, build_prompt_guard, build_signer
from weights.checkpoints import HOSTED_MODEL, choose_checkpoint, locate_files
from weights.errors import WeightsError
from weights.formats.architecture import TransformerConfig
from weights.formats.detect import match_tensors, require_match
from weights.formats.headers import read_header
from weights.hub import manifest
from weights.hub.listing import MANIFEST

LOW_DISK = 2 * 2**30  # bytes
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


class DoctorSettings(Settings):
    """Say what stands and what is missing. Takes the server's settings; exits with 1 if something would not work."""

    json_: bool = Field(False, alias="json", description="print one JSON object")
    verify: bool = Field(False, description="read every byte of pulled weights and compare it with the manifest")


class Finding(NamedTuple):
    """What was found about one thing."""

    state: Literal["ok", "warning", "failed"]
    text: str


def main(arguments: list[str]) -> int:
    settings = parse(DoctorSettings, "doctor", arguments)
    found = {name: examine(settings) for name, examine in CHECKS.items()}
    code = 1 if any(finding.state == "failed" for finding in found.values()) else 0
    if settings.json_:
        print(json.dumps({"ok": code == 0, "checks": {name: finding._asdict() for name, finding in found.items()}}))
        return code
    table = Table.grid(padding=(0, 2))
    for name, finding in found.items():
        table.add_row(name, f"[{COLOURS[finding.state]}]{finding.state}", Text(finding.text))
    Console(highlight=False).print(table)
    return code


def software(_: DoctorSettings) -> Finding:
    names = ("srpo-server", "torch", "diffusers", "transformers")
    try:
        listed = ", ".join(f"{name} {version(name)}" for name in names)
    except PackageNotFoundError as error:
        return Finding("failed", f"{error.name} is not installed")
    return Finding("ok", f"Python {platform.python_version()}, {listed}")


def gpu(settings: DoctorSettings) -> Finding:
    found = cards()
    if not found:
        wanted = any(device.startswith("cuda") for device in settings.devices)
        text = "no NVIDIA driver answers (nvidia-smi)"
        return Finding("failed" if wanted else "warning", text + ("" if wanted else ": the CPU draws, slowly"))
    listed = (f"{card.name}, {card.total / 2**30:.0f} GiB, {card.free / 2**30:.0f} free" for card in found)
    built = version("torch").partition("+")[2]
    if built == "cpu":
        return Finding("failed", f"{'; '.join(listed)}: but this torch is built for CPUs (torch {version('torch')})")
    return Finding("ok", f"{'; '.join(listed)}; driver {found[0].driver}")


def placement(settings: DoctorSettings) -> Finding:
    row = choose_checkpoint(settings.model, settings.models_dir)
    found = [] if set(settings.devices) == {"cpu"} else cards()
    precision = ("bfloat16" if found else "float32") if settings.dtype == "auto" else settings.dtype
    if not found:
        return Finding("ok", f"on the CPU. {placement_of(row, precision, settings.placement)}")
    try:
        how = holders(), settings.placement, host_memory()
        placed = [f"{card.name}: {place(row, precision, card, *how)}" for card in found]
    except DoesNotFit as error:
        return Finding("failed", str(error))
    return Finding("ok", f"{'; '.join(placed)} (--placement chooses another)")


def disk(settings: DoctorSettings) -> Finding:
    low, said = False, []
    for folder in (settings.models_dir, settings.data_dir):
        free = shutil.disk_usage(
            next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
        )
        low |= free.free < LOW_DISK
        said.append(f"{folder}: {free.free / 1e9:.1f} GB free")
    return Finding("warning" if low else "ok", "; ".join(said))


def weights(settings: DoctorSettings) -> Finding:
    """The served row's files, and whether they are what was published."""
    row = choose_checkpoint(settings.model, settings.models_dir)
    if row.embedded:
        return Finding(
            "warning", f"{row.id} stands in for {HOSTED_MODEL}: `srpo weights pull {HOSTED_MODEL}` brings it"
        )
    try:
        located = locate_files(row, settings.models_dir, settings.transformer)
        folders = [settings.models_dir / part.folder for part in row.repositories]
        if settings.transformer and located.folder:
            folders = [folder for folder in folders if folder.is_dir()]
            config = json.loads((located.folder / "transformer" / "config.json").read_text())
            match = match_tensors(read_header(settings.transformer), TransformerConfig.from_config(config))
            require_match(settings.transformer, match)
        unlisted = [folder for folder in folders if not (folder / MANIFEST).exists()]
        if unlisted:
            return Finding("warning", f"{row.id} is there; {unlisted[0]} has no manifest to verify it against")
        if settings.verify:
            if wrong := [problem for folder in folders for problem in manifest.find_problems(folder)]:
                return Finding("failed", "; ".join(wrong))
            return Finding("ok", f"{row.id} is there, every byte as it was published")
        if wrong := [problem for folder in folders for problem in sizes(folder)]:
            return Finding("failed", "; ".join(wrong))
    except WeightsError as error:
        return Finding("failed", str(error))
    return Finding("ok", f"{row.id} is there, verified when it was pulled (--verify reads every byte again)")


def sizes(folder: Path) -> Iterator[str]:
    """Files that are missing or of another size than the manifest's."""
    for path, entry in manifest.read(folder)["files"].items():
        if not (folder / path).is_file() or (folder / path).stat().st_size != entry["size"]:
            yield f"{folder / path}: missing or not of {entry['size']} bytes"


def safety(settings: DoctorSettings) -> Finding:
    """Loading the checker judges two harmless canaries, one of which it must flag."""
    try:
        guard = build_guard(settings)
        build_prompt_guard(settings)
    except SafetyUnavailable as error:
        return Finding("failed", error.cause)
    except (OSError, ValueError) as error:
        return Finding("failed", str(error))
    said = ", ".join(f"{name} {value}" for name, value in guard.description.items())
    if guard.description["checker"] == "none":
        return Finding("warning", "no image is checked; FLUX.1 [dev]'s licence asks for a filter or a review")
    return Finding("ok", f"{said}; it told the two canaries apart")


def port(settings: DoctorSettings) -> Finding:
    try:
        with closing(listen(settings)):
            return Finding("ok", f"{settings.host}:{settings.port} is free")
    except OSError as error:
        return Finding("failed", str(error))


def keys(settings: DoctorSettings) -> Finding:
    try:
        KeyRing(settings.api_keys, settings.api_keys_file)
        build_signer(settings)
    except (OSError, ValueError) as error:
        return Finding("failed", str(error))
    if settings.needs_key:
        return Finding("ok", "required")
    return Finding("ok" if settings.is_loopback else "warning", f"none: open to everyone who can reach {settings.host}")


CHECKS: dict[str, Callable[[DoctorSettings], Finding]] = {
    "software": software,
    "gpu": gpu,
    "placement": placement,
    "disk": disk,
    "weights": weights,
    "safety": safety,
    "port": port,
    "keys": keys,
}
