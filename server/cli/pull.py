"""`srpo weights pull` and `srpo weights verify`: bring the published files, and check those that are there."""

import os
import sys
from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from server.cli.parsing import parse
from server.cli.progress import ProgressBars, make_progress
from weights.checkpoints import APACHE, Repository, list_downloads
from weights.errors import WeightsError
from weights.hub import manifest
from weights.hub.listing import MANIFEST
from weights.hub.pull import PullOptions, pull

INTERRUPTED = 130


class Folder(BaseSettings):
    """What all actions know."""

    model_config = SettingsConfigDict(
        env_prefix="SRPO_", extra="ignore", cli_kebab_case=True, cli_implicit_flags="toggle", cli_hide_none_type=True
    )

    models_dir: Path = Field(Path("models"), description="folder with the model files")


class PullSettings(Folder):
    """Bring a model's files to the models folder, each checked before it is put in place. Goes on where it stopped."""

    names: CliPositionalArg[list[str]] = Field([], description=f"what to pull: {', '.join(list_downloads())}")
    revision: list[str] = Field(
        [],
        description="a commit, tag or branch in the place of the row's own; REPOSITORY=REVISION where a name needs "
        "several repositories (can be repeated)",
    )
    accept_license: bool = Field(False, description="you have read the licences and accept them")
    source: Path | None = Field(
        None,
        validation_alias=AliasChoices("from"),
        description="a folder that has the files: a mirror, another models folder",
    )
    offline: bool = Field(False, description="open no socket: take the files from --from or the hub client's cache")
    fast: bool = Field(False, description="the hub client's parallel transfer (xet); an interrupted file begins anew")


class VerifySettings(Folder):
    """Compare every pulled file with its manifest. Reads every byte."""

    names: CliPositionalArg[list[str]] = Field([], description="what to verify; nothing: all that was pulled")


def pull_files(arguments: list[str]) -> int:
    settings = parse(PullSettings, "weights pull", arguments)
    known = list_downloads()
    if not settings.names or not set(settings.names) <= set(known):
        return usage_error("pull", f"expected one or more of {', '.join(known)}")
    repositories = list(dict.fromkeys(part for name in settings.names for part in known[name]))
    try:
        revisions = dict(pinned(text, repositories) for text in settings.revision)
    except ValueError as error:
        return usage_error("pull", str(error))
    if not licences_accepted(repositories, settings.accept_license):
        return 2
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    options = PullOptions(settings.models_dir, revisions, settings.source, settings.offline, settings.fast)
    try:
        for part in repositories:
            with make_progress() as progress:
                listing = pull(part, options, ProgressBars(progress))
            folder = settings.models_dir / part.folder
            print(f"{folder}: {len(listing.files)} files of {part.name} at {listing.commit}, each verified")
    except WeightsError as error:
        print(f"srpo weights pull: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"srpo weights pull: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("srpo weights pull: stopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print(next_steps(settings.names, settings.models_dir))
    return 0


def pinned(text: str, repositories: list[Repository]) -> tuple[str, str]:
    """The repository's name and the revision of `REVISION` or `REPOSITORY=REVISION`. Raises `ValueError`."""
    name, _, revision = text.rpartition("=")
    names = [part.name for part in repositories]
    if name in names or (not name and len(names) == 1):
        return name or names[0], revision
    known = ", ".join(f"{part.name}={part.revision}" for part in repositories)
    raise ValueError(f"--revision {text}: say of which repository. Without it: {known}")


def licences_accepted(repositories: list[Repository], accepted: bool) -> bool:
    """Say in plain words what binds the operator; True where that needs no agreement or was agreed to."""
    for part in repositories:
        licence = part.licence
        print(f"{part.name}: {licence.name} ({licence.url})\n  {licence.conditions}")
    if accepted or all(part.licence is APACHE for part in repositories):
        return True
    print("srpo weights pull: read the licences; if you accept them, say --accept-license", file=sys.stderr)
    return False


def next_steps(names: list[str], models_dir: Path) -> str:
    """How each of what was pulled is served."""
    checkers = {
        "safety": f"SRPO_SAFETY_CHECKER=folder:{models_dir / 'safety'} SRPO_SAFETY_THRESHOLD=0.85",
        "safety-compvis": f"SRPO_SAFETY_CHECKER=compvis:{models_dir / 'safety-compvis'}",
    }
    return "\n".join(f"Serve it: {checkers.get(name, f'srpo serve --model {name}')}" for name in dict.fromkeys(names))


def verify(arguments: list[str]) -> int:
    settings = parse(VerifySettings, "weights verify", arguments)
    known = list_downloads()
    if not set(settings.names) <= set(known):
        return usage_error("verify", f"expected some of {', '.join(known)}")
    parts = [part for name in settings.names or known for part in known[name]]
    folders = list(dict.fromkeys(settings.models_dir / part.folder for part in parts))
    pulled = [folder for folder in folders if (folder / MANIFEST).exists()]
    if not pulled or (settings.names and len(pulled) < len(folders)):
        lacking = next(folder for folder in folders if folder not in pulled)
        print(f"srpo weights verify: {lacking / MANIFEST} is not there: nothing was pulled to it", file=sys.stderr)
        return 1
    wrong: list[str] = []
    try:
        with make_progress(transient=True) as progress:
            for folder in pulled:
                size = sum(entry["size"] for entry in manifest.read(folder)["files"].values())
                advance = ProgressBars(progress).start(str(folder), size)
                wrong += manifest.find_problems(folder, advance)
    except (WeightsError, OSError) as error:
        wrong.append(str(error))
    for problem in wrong:
        print(problem)
    if not wrong:
        print(f"{', '.join(map(str, pulled))}: every file is as it was published")
    return 1 if wrong else 0


def usage_error(action: str, problem: str) -> int:
    print(f"srpo weights {action}: {problem}", file=sys.stderr)
    return 2
