"""The house rules: direction of imports, no torch in the HTTP room, current docs."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel

from docs.tables import TABLES, pages, render
from pipelines.request import GenerationParams, ImageToImageParams
from server.__main__ import COMMANDS
from server.api.openapi import GENERATION
from server.cli.terminal.parsing import Command, Group

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1200)


def list_modules(commands: Mapping[str, Command | Group]) -> set[str]:
    """The modules of commands, and of those below them."""
    modules: set[str] = set()
    for command in commands.values():
        if isinstance(command, Group):
            modules |= list_modules(command.commands)
        else:
            modules.add(command.function.partition(":")[0])
    return modules


def test_importing_the_http_room_or_the_worker_imports_nothing_heavy() -> None:
    modules = ["server.app", "pipelines.workers.pool", "pipelines.workers.worker", "server.__main__"]
    heavy = {"torch", "diffusers", "transformers", "numpy", "psycopg", "obstore", "opentelemetry.sdk", "ray"}
    program = (
        "import importlib, sys\n"
        f"for name in {[*modules, *sorted(list_modules(COMMANDS))]}:\n"
        "    importlib.import_module(name)\n"
        f"    if found := {heavy} & set(sys.modules):\n"
        "        sys.exit(f'{name} imports {sorted(found)}')"
    )
    ended = run("-c", program)
    assert ended.returncode == 0, ended.stderr


def test_imports_go_one_way() -> None:
    ended = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-logo"], cwd=ROOT, capture_output=True)
    assert ended.returncode == 0, ended.stdout.decode()


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        pytest.param(("mypy",), marks=pytest.mark.long),
        pytest.param(("mypy", "--config-file", "tests/mypy.ini"), marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_style_and_types(command: tuple[str, ...]) -> None:
    ended = run("-m", *command)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_tables_of_the_pages_are_current_and_each_is_on_one_page() -> None:
    text = {page.name: page.read_text() for page in pages()}
    assert text == {name: render(content) for name, content in text.items()}, "run `make docs`"
    marks = [f"<!-- table: {name} -->" for name in TABLES]
    assert [sum(content.count(mark) for content in text.values()) for mark in marks] == [1] * len(marks)


def test_every_parameter_is_in_the_openapi_document() -> None:
    schemas = GENERATION["openapi_extra"]["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
    kinds: tuple[type[BaseModel], ...] = (GenerationParams, ImageToImageParams)
    for schema, params in zip(schemas, kinds, strict=True):
        assert set(schema["properties"]) == {"model", *params.model_fields}
        assert all(part["description"] for part in schema["properties"].values())
    assert [set(schema["required"]) for schema in schemas] == [{"model", "prompt"}, {"model", "prompt", "image_url"}]
