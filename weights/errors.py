"""The errors of this room. Each message names the file and says what to do."""

from pathlib import Path


class WeightsError(Exception):
    """Base of all errors of the weights room."""


class MissingFiles(WeightsError):
    def __init__(self, model: str, paths: list[Path]) -> None:
        missing = "\n".join(f"  {path}" for path in paths)
        super().__init__(
            f"{model} is not complete. Missing:\n{missing}\n"
            f"`srpo weights pull {model}` brings them (see docs/weights.md). Or choose another model "
            "with SRPO_MODEL."
        )


class WrongWeights(WeightsError):
    """A file whose tensors are not those of the architecture, or that is damaged."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class UnsafeFile(WeightsError):
    """A file that is never read: it could run code, or it is no weights file."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is refused: {problem}")


class ConversionError(WeightsError):
    """A file could not be converted. No new file is left behind."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be written: {problem}")


class BrokenManifest(WeightsError):
    """The `manifest.json` of a pull is damaged."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path} is damaged ({problem}). Move it away, and pull again: what is there is not fetched anew"
        )


class PullError(WeightsError):
    """Files could not be fetched."""


class FileMismatch(PullError):
    """A fetched file has not the size or digest that the hub publishes. It was not moved to its final place."""

    def __init__(self, path: str, what: str, expected: object, got: object) -> None:
        super().__init__(f"{path}: expected {what} {expected}, got {got}. It has not been put in place; pull again")
