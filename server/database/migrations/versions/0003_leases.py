"""Which server carries an unfinished job out, and how far it is. What an earlier version writes stays valid."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("replica", sa.String(64)))
    op.add_column("jobs", sa.Column("lease_until", sa.Float))
    op.add_column("jobs", sa.Column("attempt", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("progress", sa.Text))
