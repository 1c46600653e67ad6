"""How a command fails: it raises `CommandFailed`, which `parsing.run` prints on standard error."""

STOPPED = 130  # as a shell reports an end by Ctrl-C


class CommandFailed(Exception):
    """The command cannot do what it was asked. Each problem is shown in a line of its own, after the command's name."""

    def __init__(self, *problems: str, exit_code: int = 2) -> None:
        super().__init__(*problems)
        self.problems = problems
        self.exit_code = exit_code


def format_error(error: Exception) -> str:
    """The error's message; an error about a file without Python's `[Errno 2]`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
