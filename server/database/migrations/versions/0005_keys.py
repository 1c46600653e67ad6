"""API keys with their secrets, and the rate limits that several servers share."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("revoked", sa.Float),
        sa.Column("images_per_day", sa.Integer),
        sa.Column("concurrent_requests", sa.Integer),
        sa.Column("requests_per_minute", sa.Integer),
    )
    op.create_table(
        "key_hashes",
        sa.Column("prefix", sa.String(32), primary_key=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
    )
    op.create_index("ix_key_hashes_key_id", "key_hashes", ["key_id"])
    op.create_table(
        "rate_windows",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("hits", sa.Text, nullable=False),
    )
