"""`srpo weights verify`: reads every byte of the pulled files and compares them with their manifest."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from server.cli.terminal.failure import CommandFailed
from server.cli.terminal.parsing import parse
from server.cli.weights.progress import ProgressBars, make_progress
from server.settings.types import EnvironmentSettings, Folder
from weights.checkpoints import list_downloads
from weights.errors import WeightsError
from weights.hub import manifest
from weights.manifest import MANIFEST


class VerifySettings(EnvironmentSettings):
    """Compare every pulled file with its manifest. Reads every byte."""

    models_dir: Folder = Field(Path("models"), description="folder with the model files")
    names: CliPositionalArg[list[str]] = Field([], description="what to verify; nothing: all that was pulled")


def main(arguments: list[str]) -> int:
    """Returns exit code 1 where a file is missing or differs. Raises `CommandFailed` where nothing can be compared."""
    settings = parse(VerifySettings, "weights verify", arguments)
    known = list_downloads()
    if not set(settings.names) <= set(known):
        raise CommandFailed(f"expected some of {', '.join(known)}")
    parts = [part for name in settings.names or known for part in known[name]]
    folders = list(dict.fromkeys(settings.models_dir / part.folder for part in parts))
    pulled = [folder for folder in folders if (folder / MANIFEST).exists()]
    if not pulled or (settings.names and len(pulled) < len(folders)):
        lacking = next(folder for folder in folders if folder not in pulled)
        raise CommandFailed(f"{lacking / MANIFEST} is not there: nothing was pulled to it", exit_code=1)
    problems = find_problems(pulled)
    for problem in problems:
        print(problem)
    if problems:
        return 1
    print(f"{', '.join(map(str, pulled))}: every file is as it was published")
    return 0


def find_problems(folders: list[Path]) -> list[str]:
    """What is missing or differs in the folders, a line each; a bar for each folder shows how far the reading is."""
    problems: list[str] = []
    try:
        with make_progress(transient=True) as progress:
            for folder in folders:
                size = sum(entry.size for entry in manifest.read_entries(folder).values())
                problems += manifest.find_problems(folder, ProgressBars(progress).start(str(folder), size))
    except (WeightsError, OSError) as error:
        problems.append(str(error))
    return problems
