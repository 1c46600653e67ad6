"""What can be wrong with weights. Each message says which file, and what to do."""

from pathlib import Path


class WeightsError(Exception):
    """Base of all errors of the weights room."""


class MissingFiles(WeightsError):
    def __init__(self, model: str, paths: list[Path]) -> None:
        listed = "\n".join(f"  {path}" for path in paths)
        super().__init__(
            f"{model} is not complete. Missing:\n{listed}\n"
            "Put the files there (see the README, 'The real weights'), or choose another model with SRPO_MODEL."
        )


class WrongWeights(WeightsError):
    """A file whose tensors are not those of the architecture."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
