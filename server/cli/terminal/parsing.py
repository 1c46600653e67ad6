"""Command lines: a table of commands finds the function, and a class of settings reads its flags.

Every subcommand describes its flags as a pydantic-settings class: one with the settings of the server (flag, then
environment variable, then default), or a subclass of `Arguments`, which reads no environment.
"""

import json
import sys
from collections.abc import Mapping
from typing import NamedTuple, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pipelines.imports import import_name
from server.cli.terminal.failure import CommandFailed, format_error
from server.cli.terminal.metavars import add_argument_of

S = TypeVar("S", bound=BaseSettings)
IS_POSITIONAL = get_args(CliPositionalArg[str])[1]


class Command(NamedTuple):
    """A command: its one-line help, and `module:function`, which takes the arguments and may return an exit code."""

    help: str
    function: str


class Group(NamedTuple):
    """A command that only has commands below it."""

    help: str
    commands: Mapping[str, Command]


class VerbatimSource(CliSettingsSource[S]):
    """Takes each argument of a list as it was typed.

    pydantic-settings reads each as a list of its own: it splits a prompt at its commas, and fails at its quotation
    marks. It offers no other place to say so. What names separated by commas are (`Names`) does not come through here.
    """

    def _merge_parsed_list(self, parsed_list: list[str], field_name: str) -> str:  # noqa: ARG002
        return json.dumps(parsed_list)


class Arguments(BaseSettings):
    """Flags and positional arguments only: the environment is not read."""

    model_config = SettingsConfigDict(
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags="toggle",
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the method is pydantic-settings' own
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def run(program: str, commands: Mapping[str, Command | Group], arguments: list[str]) -> int:
    """Run the command that the first argument names. Returns its exit code, 2 for an unknown command."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(format_usage(program, commands))
        return 0
    command = commands.get(name)
    if command is None:
        print(f"{program}: there is no command {name!r}\n\n{format_usage(program, commands)}", file=sys.stderr)
        return 2
    if isinstance(command, Group):
        return run(f"{program} {name}", command.commands, rest)
    try:
        code: int | None = import_name(command.function)(rest)
    except CommandFailed as failure:
        for problem in failure.problems:
            print(f"{program} {name}: {problem}", file=sys.stderr)
        return failure.exit_code
    return code or 0


def format_usage(program: str, commands: Mapping[str, Command | Group]) -> str:
    width = max(10, *map(len, commands))
    rows = "\n".join(f"  {name:<{width}} {command.help}" for name, command in commands.items())
    return (
        f"usage: {program} COMMAND [options]\n\ncommands:\n{rows}\n\n"
        f"`{program} COMMAND --help` lists a command's options."
    )


def parse(kind: type[S], command: str, arguments: list[str], *, ignore_others: bool = False) -> S:
    """Read `kind` from flags, then environment variables, then defaults. Raises `CommandFailed` with every problem.

    `ignore_others`: arguments that it does not have are none.
    """
    hyphenated = [with_hyphens(argument) for argument in arguments]
    try:
        source: VerbatimSource[S] = VerbatimSource(
            kind,
            cli_prog_name=f"srpo {command}",
            cli_parse_args=hyphenated,
            cli_ignore_unknown_args=ignore_others,
            add_argument_method=add_argument_of(kind),
        )
        return kind(_cli_settings_source=source)
    except ValidationError as error:
        raise CommandFailed(*(describe_issue(kind, issue) for issue in error.errors(include_url=False))) from error
    except (OSError, SettingsError) as error:
        raise CommandFailed(format_error(error)) from error


def describe_issue(kind: type[BaseSettings], issue: ErrorDetails) -> str:
    """Which setting has a wrong value, and why: in pydantic's words, or what its kind (`pipelines.fields`) expects."""
    name = "_".join(str(part) for part in issue["loc"])
    place = f"{describe_setting(kind, name)}: " if name else ""
    expected = "expected " if "issues" in issue.get("ctx", {}) else ""
    return place + expected + issue["msg"].removeprefix("Value error, ")


def describe_setting(kind: type[BaseSettings], name: str) -> str:
    """How a person can give the setting: its environment variable, if the class reads them, and its flag.

    A positional argument has neither: its name, as the usage line shows it.
    """
    field = kind.model_fields.get(name)
    if field is not None and IS_POSITIONAL in field.metadata:
        return name.upper()
    flag = f"--{name.lower().replace('_', '-')}"
    return flag if issubclass(kind, Arguments) else f"SRPO_{name.upper()} ({flag})"


def with_hyphens(argument: str) -> str:
    """A flag in its usual spelling where it was typed like the API's field: --num_inference_steps."""
    flag, equals, value = argument.partition("=")
    is_flag = flag.startswith("--") and " " not in flag
    return flag.replace("_", "-") + equals + value if is_flag else argument
