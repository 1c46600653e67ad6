"""Rows that are made or changed in one statement, in the words of either database."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from server.database.base import Base

INSERTS: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def add_to_row(session: Session, table: type[Base], key: Mapping[str, Any], amounts: Mapping[str, float]) -> None:
    """Add `amounts` to the columns of the row with this primary key, which is made where there is none.

    Until the transaction ends nobody else changes the row, also where the amounts are 0.
    """
    columns = table.__table__.c
    statement = INSERTS[session.get_bind().dialect.name](table).values(**key, **amounts)
    sums = {name: columns[name] + amount for name, amount in amounts.items()}
    session.execute(statement.on_conflict_do_update(index_elements=list(key), set_=sums))


def lock_row(session: Session, table: type[Base], key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """See that there is a row with this primary key, made of `values` if not, and let nobody else change it."""
    statement = INSERTS[session.get_bind().dialect.name](table).values(**key, **values)
    unchanged = {name: table.__table__.c[name] for name in values}
    session.execute(statement.on_conflict_do_update(index_elements=list(key), set_=unchanged))
