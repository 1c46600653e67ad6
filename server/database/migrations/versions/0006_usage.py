"""What each key has used a day, and the images of its unfinished requests."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("images", sa.BigInteger, nullable=False),
        sa.Column("pixels", sa.BigInteger, nullable=False),
        sa.Column("device_seconds", sa.Float, nullable=False),
        sa.Column("credits", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "image_reservations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("images", sa.Integer, nullable=False),
        sa.Column("expires", sa.Float),
    )
    op.create_index("ix_image_reservations_owner", "image_reservations", ["owner"])
