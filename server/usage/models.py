"""The tables of usage. An owner is a key's id, the hash of a key from the settings, or "" on a server without keys."""

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from server.database.base import Base

HASHED = "sha256:"  # begins how a key of the settings is shown, which has no id


class UsageRecord(Base):
    """What an owner's finished requests have used on a day of UTC (`2026-11-26`): of those that ended with images.

    `device_seconds` are a device's own work: a request that shares its steps with others has its share of them.
    """

    __tablename__ = "usage"

    owner: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    day: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
    requests: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    images: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    pixels: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    device_seconds: Mapped[float] = mapped_column(sa.Float, default=0.0)
    credits: Mapped[int] = mapped_column(sa.BigInteger, default=0)


class ImageReservation(Base):
    """The images of an unfinished request, which count against its owner's quota: a job's until it ends, another
    request's at most until `expires`, in Unix seconds."""

    __tablename__ = "image_reservations"

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(sa.String(64), index=True)
    images: Mapped[int]
    expires: Mapped[float | None] = mapped_column(sa.Float, default=None)
