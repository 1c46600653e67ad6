"""`srpo weights pull`: downloads the published files, each verified, and says how to serve them."""

import os
from pathlib import Path

from pydantic import AliasChoices, Field
from pydantic_settings import CliPositionalArg

from server.cli.terminal.failure import STOPPED, CommandFailed
from server.cli.terminal.parsing import parse
from server.cli.weights.progress import ProgressBars, make_progress
from server.settings.types import EnvironmentSettings, Folder
from weights.checkpoints import APACHE, Repository, list_downloads
from weights.errors import WeightsError
from weights.hub.pull import PullOptions, pull


class PullSettings(EnvironmentSettings):
    """Download a model's files to the models folder and verify each. An interrupted pull continues where it stopped."""

    models_dir: Folder = Field(Path("models"), description="folder with the model files")
    names: CliPositionalArg[list[str]] = Field([], description=f"what to pull: {', '.join(list_downloads())}")
    revision: list[str] = Field(
        [],
        description="a commit, tag or branch instead of the default; REPOSITORY=REVISION if a name needs "
        "several repositories (can be repeated)",
    )
    accept_license: bool = Field(False, description="you have read the licences and accept them")
    source: Folder | None = Field(
        None,
        validation_alias=AliasChoices("from"),
        description="a folder that has the files: a mirror, another models folder",
    )
    offline: bool = Field(False, description="use no network, only --from or the hub client's cache")
    fast: bool = Field(
        False,
        description="use the hub client's parallel transfer (xet); it cannot continue a half-finished file",
    )


def main(arguments: list[str]) -> None:
    settings = parse(PullSettings, "weights pull", arguments)
    known = list_downloads()
    if not settings.names or not set(settings.names) <= set(known):
        raise CommandFailed(f"expected one or more of {', '.join(known)}")
    repositories = list(dict.fromkeys(part for name in settings.names for part in known[name]))
    revisions = dict(parse_revision(text, repositories) for text in settings.revision)
    accept_licences(repositories, settings.accept_license)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    options = PullOptions(settings.models_dir, revisions, settings.source, settings.offline, settings.fast)
    try:
        for part in repositories:
            with make_progress() as progress:
                listing = pull(part, options, ProgressBars(progress))
            folder = settings.models_dir / part.folder
            print(f"{folder}: {len(listing.files)} files of {part.name} at {listing.commit}, each verified")
    except (WeightsError, OSError) as error:
        raise CommandFailed(str(error), exit_code=1) from error
    except KeyboardInterrupt:
        raise CommandFailed("stopped; the same command goes on from here", exit_code=STOPPED) from None
    print(format_next_steps(settings.names, settings.models_dir))


def parse_revision(text: str, repositories: list[Repository]) -> tuple[str, str]:
    """The repository's name and the revision of `REVISION` or `REPOSITORY=REVISION`. Raises `CommandFailed`."""
    name, _, revision = text.rpartition("=")
    names = [part.name for part in repositories]
    if name in names or (not name and len(names) == 1):
        return name or names[0], revision
    known = ", ".join(f"{part.name}={part.revision}" for part in repositories)
    raise CommandFailed(f"--revision {text}: say of which repository. Without it: {known}")


def accept_licences(repositories: list[Repository], accepted: bool) -> None:
    """Print what each licence asks of the operator. Raises `CommandFailed` where one must be accepted and was not."""
    for part in repositories:
        licence = part.licence
        print(f"{part.name}: {licence.name} ({licence.url})\n  {licence.conditions}")
    if not accepted and any(part.licence is not APACHE for part in repositories):
        raise CommandFailed("read the licences; if you accept them, say --accept-license")


def format_next_steps(names: list[str], models_dir: Path) -> str:
    """The command or settings that use each of the pulled names."""
    checkers = {
        "safety": f"SRPO_SAFETY_CHECKER=folder:{models_dir / 'safety'} SRPO_SAFETY_THRESHOLD=0.85",
        "safety-compvis": f"SRPO_SAFETY_CHECKER=compvis:{models_dir / 'safety-compvis'}",
    }
    return "\n".join(f"Serve it: {checkers.get(name, f'srpo serve --model {name}')}" for name in dict.fromkeys(names))
