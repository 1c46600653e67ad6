"""Alembic's environment: the connection is the one that `JobStore.open` brings, or leads to the file named by `-x`.

A new revision after a change of `server.jobs.models`, beside a server's data folder:
`alembic -x file=data/jobs.sqlite3 revision --autogenerate --rev-id 0003 -m "what changes"`.
"""

import sqlalchemy as sa
from alembic import context

from server.jobs.models import Base


def migrate(connection: sa.Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


if (connection := context.config.attributes.get("connection")) is not None:
    migrate(connection)
else:
    file = context.get_x_argument(as_dictionary=True)["file"]
    with sa.create_engine(f"sqlite:///{file}").begin() as connection:
        migrate(connection)
