"""The pages' generated tables (parameters, settings, errors, ...). `make docs` writes them; a test fails on drift."""

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from pipelines.acceleration import PRESETS
from pipelines.optimize.optimizations import OPTIMIZATIONS
from pipelines.request import PARAM_TYPES, GenerationParams, ImageToImageParams
from server.envelope import UNEXPECTED_NAME
from server.error_table import TABLE, UNEXPECTED
from server.metrics.table import METRICS
from server.settings.server import Settings
from server.settings.types import COMMON, UNITS, EnvironmentSettings

FOLDER = Path(__file__).parent
ALERTS = FOLDER.parent / "deploy" / "prometheus" / "alerts.yml"
RULES = FOLDER.parent / "deploy" / "kubernetes" / "monitoring" / "rules.yaml"
RULES_HEAD = """\
# The alerts of deploy/prometheus/alerts.yml, for the Prometheus operator. `make docs` writes this file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: srpo
spec:
"""
PARAMETERS = ("field", "expects", "default", "meaning")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def rows_of(fields: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    def default(field: Any) -> str:
        if field.json_schema_extra:
            return f"`{field.json_schema_extra['default']}`"
        if field.default is PydanticUndefined:
            return "required" if field.is_required() else "drawn"
        return f"`{json.dumps(field.default)}`"

    for name, field in fields.items():
        yield f"`{name}`", PARAM_TYPES[name].expected, default(field), field.description or ""


def parameters() -> str:
    """Every generation parameter, from `GenerationParams`."""
    return table(PARAMETERS, rows_of(GenerationParams.model_fields))


def image_to_image() -> str:
    """Those of image-to-image that are its own, or have another default there."""
    drawn = GenerationParams.model_fields
    own = {
        name: field
        for name, field in ImageToImageParams.model_fields.items()
        if name not in drawn or field.default != drawn[name].default
    }
    return table(PARAMETERS, rows_of(own))


def settings() -> str:
    """Every setting, in groups: first those that most servers set, then by the class that declares them."""

    def default(value: Any) -> str:
        if value is None or value == ():
            return "none"
        if isinstance(value, tuple):
            return f"`{','.join(value)}`"
        for unit, size in reversed(UNITS.items()):
            if isinstance(value, int) and value >= size > 2**10 and value % size == 0:
                return f"`{value // size}{unit}`"
        return f"`{value}`"

    def rows(names: Iterable[str]) -> str:
        fields = ((name, Settings.model_fields[name]) for name in names)
        return table(
            ("variable", "flag", "default", "meaning"),
            (
                (
                    f"`SRPO_{name.upper()}`",
                    f"`--{name.replace('_', '-')}`",
                    default(field.default),
                    field.description or "",
                )
                for name, field in fields
            ),
        )

    common = {name for name, field in Settings.model_fields.items() if field.json_schema_extra == COMMON}
    groups = {
        (kind.__doc__ or "").partition(".")[0]: [name for name in inspect.get_annotations(kind) if name not in common]
        for kind in Settings.__mro__
        if issubclass(kind, EnvironmentSettings)
    }
    first = [name for kind in Settings.__mro__ for name in inspect.get_annotations(kind) if name in common]
    shown = {"What most servers set": first, **groups}
    return "\n".join(f"### {title}\n\n{rows(names)}" for title, names in shown.items() if names)


def errors() -> str:
    """Every error, from the error table, and what all others are on the wire."""
    rows = {kind.__name__: row for kind, row in TABLE.items()} | {UNEXPECTED_NAME: UNEXPECTED}
    return table(
        ("status", "`error.code`", "`error.name`", "retry?", "meaning, and what to do"),
        (
            (
                str(row.status),
                f"`{row.code}`" if row.code else "per field",
                f"`{name}`",
                "no" if row.status < 429 or row.repeats else "log only" if row.status == 499 else "yes",
                row.meaning,
            )
            for name, row in sorted(rows.items(), key=lambda item: item[1].status)
        ),
    )


def acceleration() -> str:
    """How many steps each preset computes, from `PRESETS`."""
    lengths = (4, 8, 12, 28, 40, 50)
    return table(
        ("`acceleration`", *(f"of {steps}" for steps in lengths)),
        ((f"`{name}`", *(str(sum(mask(steps))) for steps in lengths)) for name, mask in PRESETS.items()),
    )


def optimizations() -> str:
    """What makes the engine fast, from `OPTIMIZATIONS`."""
    return table(
        ("optimization", "what", "accuracy", "by default on"),
        (
            (f"`{name}`", optimization.description, optimization.accuracy, ", ".join(optimization.devices) or "none")
            for name, optimization in OPTIMIZATIONS.items()
        ),
    )


def clients() -> str:
    """Which clients work, from the last run of `make clients`."""
    rows = json.loads((FOLDER / "clients.json").read_text())

    def cell(row: Mapping[str, Any], name: str) -> str:
        return "<br>".join(f"`{text}`" for text in ([row[name]] if isinstance(row[name], str) else row[name]) if text)

    return table(
        ("client", "version", "what it calls", "the one setting it needs", "program", "result", "date"),
        (
            (
                row["name"],
                row["version"],
                cell(row, "calls"),
                cell(row, "setting") or "none",
                f"[{row['program']}](../tests/clients/{row['program']})" if row["program"] else "none",
                row["result"],
                row["date"],
            )
            for row in rows
        ),
    )


def metrics() -> str:
    """Every metric, from the table of metrics."""
    return table(
        ("metric", "kind", "labels", "meaning"),
        (
            (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help)
            for metric in METRICS
        ),
    )


def alerts() -> str:
    """Every alert, from the rules for Prometheus."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return table(
        ("alert", "severity", "what has happened", "what to do"),
        (
            (
                f"`{rule['alert']}`",
                rule["labels"]["severity"],
                *(rule["annotations"][key] for key in ("summary", "action")),
            )
            for group in groups
            for rule in group["rules"]
        ),
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "alerts": alerts,
    "clients": clients,
    "parameters": parameters,
    "image_to_image": image_to_image,
    "settings": settings,
    "errors": errors,
    "metrics": metrics,
    "acceleration": acceleration,
    "optimizations": optimizations,
}


def pages() -> Sequence[Path]:
    """The pages of this folder, of which some have tables."""
    return sorted(FOLDER.glob("*.md"))


def render(text: str) -> str:
    """A page's text with every marked table made anew."""
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[4], text)


def rules() -> str:
    """The alerts as a resource of the Prometheus operator."""
    _, key, groups = ALERTS.read_text().partition("groups:\n")
    return RULES_HEAD + textwrap.indent(key + groups, "  ")


if __name__ == "__main__":
    RULES.write_text(rules())
    for page in pages():
        page.write_text(render(page.read_text()))
