"""`srpo weights convert`: writes a transformer in another format, with a manifest of its source."""

import importlib
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import CliPositionalArg

from pipelines.fields import Choice
from server.cli.terminal.failure import STOPPED, CommandFailed
from server.cli.terminal.parsing import Arguments, parse
from server.cli.terminal.text import escape
from server.cli.weights.progress import ProgressBars, make_progress
from server.settings.types import describe_choices
from weights.errors import WeightsError
from weights.formats.output_formats import OUTPUT_FORMATS


class ConvertSettings(Arguments):
    """Write a transformer in another format. The target file appears only when it is complete."""

    source: CliPositionalArg[Path] = Field(description="a transformer in any format")
    target: CliPositionalArg[Path] = Field(description="the file to write")
    to: Annotated[str, Choice(tuple(OUTPUT_FORMATS))] = Field(
        "bf16", description=describe_choices({name: row.description for name, row in OUTPUT_FORMATS.items()})
    )
    revision: str | None = Field(
        None, description="the source's revision, for the manifest; default: the one that `srpo weights pull` stored"
    )


def main(arguments: list[str]) -> None:
    settings = parse(ConvertSettings, "weights convert", arguments)
    convert = importlib.import_module("weights.formats.convert").convert  # torch: only here
    try:
        with make_progress() as progress:
            made = convert(settings.source, settings.to, settings.target, settings.revision, ProgressBars(progress))
    except (WeightsError, OSError) as error:
        raise CommandFailed(escape(str(error))) from error
    except KeyboardInterrupt:
        raise CommandFailed("stopped; nothing was put in place", exit_code=STOPPED) from None
    print(f"{made.path}: {made.size:,} bytes, sha256 {made.sha256}")
