"""The house rules: direction of imports, no torch in the HTTP room, current docs."""

import subprocess
import sys
from pathlib import Path

import pytest

from docs.tables import TABLES, pages, render
from pipelines.request import GenerationParams, ImageToImageParams
from server.api.openapi import GENERATION

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "module",
    ["server.app", *(f"server.cli.{name}" for name in ("serve", "generate", "doctor", "weights.pull"))]
    + [f"pipelines.workers.{name}" for name in ("worker", "pool")],
)
def test_importing_the_http_room_or_the_worker_never_imports_torch(module: str) -> None:
    heavy = (
        "{'torch', 'diffusers', 'transformers', 'numpy', 'psycopg', 'obstore', 'opentelemetry.sdk'} & set(sys.modules)"
    )
    ended = run("-c", f"import sys, {module}; print(sorted({heavy}))")
    assert ended.stdout.strip() == "[]", ended.stderr


def test_imports_go_one_way() -> None:
    ended = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-logo"], cwd=ROOT, capture_output=True)
    assert ended.returncode == 0, ended.stdout.decode()


@pytest.mark.parametrize(
    "command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=" ".join
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
    for schema, params in zip(schemas, (GenerationParams, ImageToImageParams), strict=True):
        assert set(schema["properties"]) == {"model", *params.model_fields}
        assert all(part["description"] for part in schema["properties"].values())
    assert [set(schema["required"]) for schema in schemas] == [{"model", "prompt"}, {"model", "prompt", "image_url"}]
