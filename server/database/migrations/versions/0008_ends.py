"""An index for those that look for jobs that ended long ago.

Postgres makes it in about a second for each million of jobs, in which servers that run wait with what they write.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("jobs_by_end", "jobs", ["state", "finished"])
