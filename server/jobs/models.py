"""The tables of the job database. A change here needs a revision in `migrations/versions`; a test compares the two."""

import json
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

log = structlog.get_logger("srpo")
ACCEPTED, SUCCEEDED, FAILED, CANCELLED, EXPIRED = "accepted", "succeeded", "failed", "cancelled", "expired"


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


class JobRecord(Base):
    """One job: what was accepted, and how it ended.

    `request` is what is needed to carry it out again: the translated fields with the seed, and how to deliver.
    `outcome` is the reply's body, or the error's envelope, as JSON text, so that a replay has the same bytes.
    `created` and `finished` are Unix seconds.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        sa.UniqueConstraint("owner", "idempotency_key", name="one_job_a_key"),
        sa.Index("jobs_by_state", "state", "number"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[str] = mapped_column(sa.String(64), unique=True)
    owner: Mapped[str] = mapped_column(sa.String(64))
    idempotency_key: Mapped[str | None] = mapped_column(sa.String(255))
    body_hash: Mapped[str] = mapped_column(sa.String(64))
    request: Mapped[dict[str, Any] | None] = mapped_column(JSONText)
    created: Mapped[float] = mapped_column(sa.Float)
    state: Mapped[str] = mapped_column(sa.String(16), default=ACCEPTED)
    finished: Mapped[float | None] = mapped_column(sa.Float, default=None)
    status: Mapped[int | None] = mapped_column(default=None)
    headers: Mapped[dict[str, str] | None] = mapped_column(JSONText, default=None)
    outcome: Mapped[str | None] = mapped_column(sa.Text, default=None)
    number: Mapped[int] = mapped_column(primary_key=True, init=False)  # in the order of acceptance


class SourcePicture(Base):
    """The pixels that an unfinished job begins at. They go when it ends."""

    __tablename__ = "sources"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    pixels: Mapped[bytes] = mapped_column(sa.LargeBinary)
