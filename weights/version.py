"""The software's own version, also in a tree that is not installed."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "srpo-server"
PROJECT_FILE = Path(__file__).parent.parent / "pyproject.toml"


def read_version() -> str:
    """That of the installed package, else the one in the tree's `pyproject.toml`. Raises `FileNotFoundError` where
    there is neither."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return str(tomllib.loads(PROJECT_FILE.read_text())["project"]["version"])
