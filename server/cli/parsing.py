"""Settings from the command line, with errors for people."""

import sys
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource

S = TypeVar("S", bound=BaseSettings)


def parse(kind: type[S], command: str, arguments: list[str]) -> S:
    """`kind` from flags, then environment, then defaults. Prints what is wrong and exits with 2."""
    spelled = [with_hyphens(argument) for argument in arguments]
    source: CliSettingsSource[S] = CliSettingsSource(kind, cli_prog_name=f"srpo {command}", cli_parse_args=spelled)
    try:
        return kind(_cli_settings_source=source)
    except ValidationError as error:
        for issue in error.errors(include_url=False):
            name = "_".join(str(part) for part in issue["loc"]).upper()
            place = f"SRPO_{name} (--{name.lower().replace('_', '-')}): " if name else ""
            print(f"srpo {command}: {place}{issue['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"srpo {command}: {told(error)}", file=sys.stderr)
        sys.exit(2)


def with_hyphens(argument: str) -> str:
    """A flag as it is spelled here, also where it was typed as the API's field: --num_inference_steps."""
    flag, equals, value = argument.partition("=")
    spelled = flag.startswith("--") and " " not in flag
    return flag.replace("_", "-") + equals + value if spelled else argument


def told(error: Exception) -> str:
    """An error in words; of a file without Python's `[Errno 2]`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
