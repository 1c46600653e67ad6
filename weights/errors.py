"""What can be wrong with weights. Each message says which file, and what to do."""

from pathlib import Path


class WeightsError(Exception):
    """Base of all errors of the weights room."""


class MissingFiles(WeightsError):
    def __init__(self, model: str, paths: list[Path]) -> None:
        listed = "\n".join(f"  {path}" for path in paths)
        super().__init__(
            f"{model} is not complete. Missing:\n{listed}\n"
            f"`srpo weights pull {model}` brings them (see the README, 'The real weights'). Or choose another model "
            "with SRPO_MODEL."
        )


class WrongWeights(WeightsError):
    """A file whose tensors are not those of the architecture."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class UnsafeFile(WeightsError):
    """A file that is not read at all, whatever it holds: it could run code, or it is no weights file."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is refused: {problem}")


class ConversionError(WeightsError):
    """A file that cannot be written. Nothing stands at its place."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be written: {problem}")


class PullError(WeightsError):
    """Files that could not be brought. The message names the file, and says what to do."""


class FileMismatch(PullError):
    """A file that is not what the hub says it is. It has not been put in place."""

    def __init__(self, path: str, what: str, expected: object, got: object) -> None:
        super().__init__(f"{path}: expected {what} {expected}, got {got}. It has not been put in place; pull again")
