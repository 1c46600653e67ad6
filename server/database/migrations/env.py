"""Alembic's environment: the connection is the one that `Database.open` brings, or leads to the database named by `-x`.

A new revision after a change of a table, beside a server's data folder:
`alembic -x url=sqlite:///data/jobs.sqlite3 revision --autogenerate --rev-id 0003 -m "what changes"`.
"""

from importlib import import_module

import sqlalchemy as sa
from alembic import context

from server.database.base import TABLES, Base


def migrate(connection: sa.Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


if (connection := context.config.attributes.get("connection")) is not None:
    migrate(connection)
else:
    for module in TABLES:
        import_module(module)
    with sa.create_engine(context.get_x_argument(as_dictionary=True)["url"]).begin() as connection:
        migrate(connection)
