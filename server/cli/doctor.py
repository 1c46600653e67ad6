"""`srpo doctor`: what works and what is missing, on one screen, before the server is started. Imports no torch."""

import json
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Literal, NamedTuple

import httpx2
from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.errors import SafetyUnavailable
from pipelines.loading.cards import Card, DriverUnavailable, explain_too_old, explain_unusable, list_cards, list_holders
from pipelines.loading.placement import DoesNotFit, choose_placement, get_placement, measure_host_memory
from pipelines.optimize.optimizations import select_optimizations
from server.cli.serve import listen
from server.cli.terminal.banner import format_address
from server.cli.terminal.parsing import parse
from server.database.database import Database, resolve_url
from server.engine_setup import build_guard, build_prompt_guard, build_signer
from server.errors import StorageFailure
from server.images.stores.table import open_store
from server.security.keys import KeyRing
from server.settings.server import Settings
from weights.checkpoints import HOSTED_MODEL, choose_checkpoint, locate_files
from weights.errors import WeightsError
from weights.formats.architecture import TransformerConfig
from weights.formats.detect import match_tensors, require_match
from weights.formats.headers import read_header
from weights.hub import manifest
from weights.manifest import MANIFEST
from weights.version import DISTRIBUTION, read_version

COMPILE = "compile"  # a row of OPTIMIZATIONS
LOW_DISK = 2 * 2**30  # bytes
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


class DoctorSettings(Settings):
    """Say what works and what is missing. Takes the server's settings; exits with 1 if something would not work."""

    json_: bool = Field(False, alias="json", description="print one JSON object")
    verify: bool = Field(False, description="read every byte of pulled weights and compare it with the manifest")


class Finding(NamedTuple):
    """The result of one check."""

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


def check_software(_: DoctorSettings) -> Finding:
    names = ("torch", "diffusers", "transformers")
    try:
        listed = ", ".join([f"{DISTRIBUTION} {read_version()}", *(f"{name} {version(name)}" for name in names)])
    except PackageNotFoundError as error:
        return Finding("failed", f"{error.name} is not installed")
    return Finding("ok", f"Python {platform.python_version()}, {listed}")


def wants_cpu_only(settings: DoctorSettings) -> bool:
    return all(device.startswith("cpu") for device in settings.devices)


def count_cards_needed(settings: DoctorSettings) -> int:
    """How many of the machine's cards have to be usable.

    Which ones cannot be told: CUDA's numbers, as in cuda:1, are not the driver's, since it begins with the fastest.
    """
    named = {part for device in settings.devices for part in device.split("+") if part.startswith("cuda:")}
    return max(1, len(named))


def check_gpu(settings: DoctorSettings) -> Finding:
    if wants_cpu_only(settings):
        return Finding("ok", "not needed: the CPU draws, slowly")
    if rocm := read_torch_build().get("hip"):
        named = any(device.startswith("cuda") for device in settings.devices)
        advice = "" if named else ": --devices cuda uses one all the same"
        return Finding("warning", f"torch {version('torch')} is for AMD cards (ROCm {rocm}), which are untried{advice}")
    try:
        found = list_cards()
        problem = "" if found else "the NVIDIA driver knows no card"
    except DriverUnavailable as error:
        found, problem = [], f"no NVIDIA driver answers ({error})"
    if problem:
        wanted = any(device.startswith("cuda") for device in settings.devices)
        return Finding("failed" if wanted else "warning", problem + ("" if wanted else ": the CPU draws, slowly"))
    listed = (f"{card.name}, {card.total / 2**30:.0f} GiB, {card.free / 2**30:.0f} free" for card in found)
    too_old = [reason for card in found if (reason := explain_too_old(card.name, card.capability))]
    if too_old and len(found) - len(too_old) < count_cards_needed(settings):
        return Finding("failed", too_old[0])
    if unusable := explain_unusable(found[0], read_torch_build().get("cuda"), version("torch")):
        return Finding("failed", f"{'; '.join(listed)}: but {unusable}")
    if too_old:
        return Finding("warning", f"not every card can be used: {too_old[0]}")
    return Finding("ok", f"{'; '.join(listed)}; driver {found[0].driver}")


def check_compiler(settings: DoctorSettings) -> Finding:
    cards = [] if wants_cpu_only(settings) else list_cards_or_none()
    if not cards or COMPILE not in select_optimizations(settings.optimizations, "cuda"):
        return Finding("ok", "not needed: nothing is compiled")
    header = Path(sysconfig.get_path("include"), "Python.h")
    names = (os.environ.get("CC", "gcc"), "clang", "cc")
    if any(map(shutil.which, names)) and shutil.which(os.environ.get("CXX", "g++")) and header.exists():
        return Finding("ok", "there, with Python's headers")
    return Finding("warning", "optimizations need one, and Python's headers (Debian: apt-get install g++ python3-dev)")


def read_torch_build() -> dict[str, str | None]:
    """`torch.version` without torch: `cuda` and `hip` are the versions it is built for, or None."""
    found = find_spec("torch")
    folders = found.submodule_search_locations if found else None
    return run_path(str(Path(folders[0]) / "version.py")) if folders else {}


def list_cards_or_none() -> list[Card]:
    """The machine's cards; none where no driver answers."""
    try:
        return list_cards()
    except DriverUnavailable:
        return []


def check_placement(settings: DoctorSettings) -> Finding:
    checkpoint = choose_checkpoint(settings.model, settings.models_dir)
    found = [] if wants_cpu_only(settings) else list_cards_or_none()
    found = [card for card in found if not explain_too_old(card.name, card.capability)] or found
    precision = ("bfloat16" if found else "float32") if settings.dtype == "auto" else settings.dtype
    if not found and any(checkpoint.sizes) and not wants_cpu_only(settings):
        return Finding(
            "failed", f"{checkpoint.id} needs a GPU; on a CPU it is very slow: ask for that with --devices cpu"
        )
    if not found:
        return Finding("ok", f"on the CPU. {get_placement(checkpoint, precision, settings.placement)}")
    how = list_holders(), settings.placement, measure_host_memory(), settings.processes, "fp8" in settings.optimizations
    placed, problems = [], []
    for card in found:
        try:
            placed.append(f"{card.name}: {choose_placement(checkpoint, precision, card, *how)}")
        except DoesNotFit as error:
            problems.append(str(error))
    if len(placed) < count_cards_needed(settings):
        return Finding("failed", problems[0] if problems else "fewer cards than are asked for")
    if problems:
        return Finding("warning", f"{'; '.join(placed)}; not on every card: {problems[0]}")
    return Finding("ok", f"{'; '.join(placed)} (--placement chooses another)")


def check_disk(settings: DoctorSettings) -> Finding:
    is_low, lines = False, []
    for folder in (settings.models_dir, settings.data_dir):
        free = shutil.disk_usage(
            next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
        )
        is_low |= free.free < LOW_DISK
        lines.append(f"{folder}: {free.free / 1e9:.1f} GB free")
    return Finding("warning" if is_low else "ok", "; ".join(lines))


def check_storage(settings: DoctorSettings) -> Finding:
    """Whether the database and the bucket can be used that servers share. Changes no table."""
    places = [str(settings.data_dir)]
    try:
        if settings.database_url is not None:
            with closing(Database(resolve_url(settings.database_url, settings.data_dir))) as database:
                places.append(database.place)
                database.check()
        if settings.store_url is not None:
            places.append(open_store(settings, time.time).place)
    except (OSError, ValueError) as error:
        return Finding("failed", str(error))
    except StorageFailure as error:
        return Finding("failed", f"{places[-1]}: {error.__cause__ or error}".partition("\n")[0])
    return Finding("ok", ", ".join(places))


def check_weights(settings: DoctorSettings) -> Finding:
    """Whether the files of the served model are there, and are those that were published."""
    checkpoint = choose_checkpoint(settings.model, settings.models_dir)
    if checkpoint.embedded:
        return Finding(
            "warning", f"{checkpoint.id} stands in for {HOSTED_MODEL}: `srpo weights pull {HOSTED_MODEL}` brings it"
        )
    try:
        located = locate_files(checkpoint, settings.models_dir, settings.transformer)
        folders = [settings.models_dir / part.folder for part in checkpoint.repositories]
        if settings.transformer and located.folder:
            folders = [folder for folder in folders if folder.is_dir()]
            config = json.loads((located.folder / "transformer" / "config.json").read_text())
            match = match_tensors(read_header(settings.transformer), TransformerConfig.from_config(config))
            require_match(settings.transformer, match)
        unlisted = [folder for folder in folders if not (folder / MANIFEST).exists()]
        if unlisted:
            return Finding("warning", f"{checkpoint.id} is there; {unlisted[0]} has no manifest to verify it against")
        if settings.verify:
            if problems := [problem for folder in folders for problem in manifest.find_problems(folder)]:
                return Finding("failed", "; ".join(problems))
            return Finding("ok", f"{checkpoint.id} is there, every byte as it was published")
        if problems := [problem for folder in folders for problem in manifest.find_problems(folder, whole=False)]:
            return Finding("failed", "; ".join(problems))
    except WeightsError as error:
        return Finding("failed", str(error))
    return Finding("ok", f"{checkpoint.id} is there, verified when it was pulled (--verify reads every byte again)")


def check_safety(settings: DoctorSettings) -> Finding:
    """Loading a checker tests it: of two harmless test pictures it must flag exactly one."""
    try:
        guard = build_guard(settings)
        build_prompt_guard(settings)
    except SafetyUnavailable as error:
        return Finding("failed", error.cause)
    except (OSError, ValueError) as error:
        return Finding("failed", str(error))
    policy = ", ".join(f"{name} {value}" for name, value in guard.description.items())
    if guard.description["checker"] == "none":
        return Finding("warning", "no image is checked; FLUX.1 [dev]'s licence asks for a filter or a review")
    return Finding("ok", f"{policy}; it told the two canaries apart")


def check_port(settings: DoctorSettings) -> Finding:
    try:
        with closing(listen(settings.host, settings.port, "--port")):
            return Finding("ok", f"{settings.host}:{settings.port} is free")
    except OSError as error:
        if model := find_served_model(settings):
            return Finding("ok", f"{settings.host}:{settings.port} is this server's: it runs, and serves {model}")
        return Finding("failed", str(error))


def find_served_model(settings: DoctorSettings) -> str | None:
    """What a server like this one serves on the port, if one answers there."""
    try:
        answer = httpx2.get(f"{format_address(settings, settings.port, own=True)}/health", timeout=2, trust_env=False)
        return str(answer.json()["served_model"])
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None


def check_keys(settings: DoctorSettings) -> Finding:
    try:
        KeyRing(settings.api_keys, settings.api_keys_file)
        build_signer(settings)
    except (OSError, ValueError) as error:
        return Finding("failed", str(error))
    if settings.needs_key:
        return Finding("ok", "required")
    return Finding("ok" if settings.is_loopback else "warning", f"none: open to everyone who can reach {settings.host}")


CHECKS: dict[str, Callable[[DoctorSettings], Finding]] = {
    "software": check_software,
    "gpu": check_gpu,
    "compiler": check_compiler,
    "placement": check_placement,
    "disk": check_disk,
    "storage": check_storage,
    "weights": check_weights,
    "safety": check_safety,
    "port": check_port,
    "keys": check_keys,
}
