"""The tables of API keys. A key is kept when it is revoked, since its jobs and its usage name it."""

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column, relationship

from server.database.base import Base, JSONText


class KeySecret(Base):
    """What proves a key: the hash of the text that its client has, found by the public beginning of that text.

    A key that is rotated has several for a while. `expires` is in Unix seconds; None: with the key.
    """

    __tablename__ = "key_hashes"

    prefix: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    key_id: Mapped[str] = mapped_column(sa.String(32), index=True)
    hash: Mapped[str] = mapped_column(sa.String(64))
    created: Mapped[float] = mapped_column(sa.Float)
    expires: Mapped[float | None] = mapped_column(sa.Float, default=None)


class KeyRecord(Base):
    """A key: what it may do and take. Times are Unix seconds."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    scopes: Mapped[list[str]] = mapped_column(JSONText)
    created: Mapped[float] = mapped_column(sa.Float)
    expires: Mapped[float | None] = mapped_column(sa.Float, default=None)
    revoked: Mapped[float | None] = mapped_column(sa.Float, default=None)
    images_per_day: Mapped[int | None] = mapped_column(default=None)
    concurrent_requests: Mapped[int | None] = mapped_column(default=None)
    requests_per_minute: Mapped[int | None] = mapped_column(default=None)
    secrets: Mapped[list[KeySecret]] = relationship(
        primaryjoin=lambda: sa.orm.foreign(KeySecret.key_id) == KeyRecord.id,
        order_by=lambda: KeySecret.created,
        cascade="all, delete-orphan",
        lazy="selectin",
        default_factory=list,
    )


class RateWindow(Base):
    """When a key's requests of the last minute came, where several servers share a limit. One row a key and limit."""

    __tablename__ = "rate_windows"

    name: Mapped[str] = mapped_column(sa.String(128), primary_key=True)
    hits: Mapped[list[float]] = mapped_column(JSONText)
