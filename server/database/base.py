"""What the tables have in common. Those who keep records declare theirs on `Base`, each in its own folder.

A change of a table needs a revision in `migrations/versions`; a test compares the two.
"""

import json
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import DeclarativeBase, MappedAsDataclass

# The modules that declare tables, by name: this folder knows none of them.
TABLES = ("server.jobs.models", "server.security.models", "server.usage.models")
log = structlog.get_logger("srpo")


class JSONText(sa.types.TypeDecorator[Any]):
    """A JSON value in a column of text."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:  # noqa: ARG002 - SQLAlchemy's signature
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        try:
            return json.loads(value) if value else None
        except ValueError:  # one damaged row must not hide the others
            log.error("job_row_damaged")
            return None


class Base(MappedAsDataclass, DeclarativeBase, eq=False):
    """What the tables have in common."""
