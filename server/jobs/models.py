"""The tables of jobs."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column, relationship

from server.database.base import Base, JSONText

WAITING, PENDING, DELIVERED = "waiting", "pending", "delivered"  # of a webhook; it may be FAILED too
ACCEPTED, SUCCEEDED, FAILED, CANCELLED, EXPIRED = "accepted", "succeeded", "failed", "cancelled", "expired"
ENDED = (SUCCEEDED, FAILED, CANCELLED)  # and not expired yet


class WebhookDelivery(Base):
    """Where a job's end is to be told, and how that went. `due` and `delivered` are Unix seconds.

    `status` is what the receiver answered last; `host` is that of `url`, with the port.
    """

    __tablename__ = "webhooks"
    __table_args__ = (sa.Index("webhooks_by_due", "state", "due"),)

    job_id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(sa.String(64))
    url: Mapped[str] = mapped_column(sa.Text)
    host: Mapped[str] = mapped_column(sa.String(300))
    state: Mapped[str] = mapped_column(sa.String(16), default=WAITING)
    attempts: Mapped[int] = mapped_column(default=0)
    due: Mapped[float | None] = mapped_column(sa.Float, default=None)
    status: Mapped[int | None] = mapped_column(default=None)
    delivered: Mapped[float | None] = mapped_column(sa.Float, default=None)


class SigningKey(Base):
    """A secret of the server's that is made at its first use."""

    __tablename__ = "signing_keys"

    name: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    value: Mapped[str] = mapped_column(sa.String(64))


class JobRecord(Base):
    """One job: what was accepted, and how it ended.

    `request` is what is needed to carry it out again: the translated fields with the seed, and how to deliver.
    `outcome` is the reply's body, or the error's envelope, as JSON text, so that a replay has the same bytes; images
    that the reply holds in base64 are left out of it, and `pictures` says which stored files belong where.
    `created`, `finished` and `lease_until` are Unix seconds.

    While it is unfinished, `replica` is the server that carries it out, until `lease_until` unless that renews it;
    `attempt` counts how often another one took it over, and `progress` is the newest that servers tell each other.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        sa.UniqueConstraint("owner", "idempotency_key", name="one_job_a_key"),
        sa.Index("jobs_by_state", "state", "number"),
        sa.Index("jobs_by_end", "state", "finished"),
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
    pictures: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONText, default=None)
    replica: Mapped[str | None] = mapped_column(sa.String(64), default=None)
    lease_until: Mapped[float | None] = mapped_column(sa.Float, default=None)
    attempt: Mapped[int] = mapped_column(default=0, server_default="0")
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSONText, default=None)
    webhook: Mapped[WebhookDelivery | None] = relationship(
        primaryjoin=lambda: sa.orm.foreign(WebhookDelivery.job_id) == JobRecord.id,
        uselist=False,
        lazy="selectin",
        default=None,
    )
    number: Mapped[int] = mapped_column(primary_key=True, init=False)  # in the order of acceptance

    @property
    def fields(self) -> Mapping[str, Any]:
        """What was asked for, in the API's own fields; none where that is not kept any more."""
        fields: Mapping[str, Any] = self.request["spoken"]["native"] if self.request else {}
        return fields

    @property
    def base_url(self) -> str:
        """The address of the server that was asked; empty where that is not kept any more."""
        return str(self.request["base_url"]) if self.request else ""


class SourcePicture(Base):
    """The pixels that an unfinished job begins at. They go when it ends."""

    __tablename__ = "sources"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    pixels: Mapped[bytes] = mapped_column(sa.LargeBinary)
