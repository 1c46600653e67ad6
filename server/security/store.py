"""The keys in the database: made, listed, revoked, rotated. A key's text is told once, when it is made."""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.database.database import Database
from server.errors import NotFound
from server.security.callers import SCOPES, Caller, Quota, Scope
from server.security.models import KeyRecord, KeySecret

PREFIX_LENGTH = 15  # of `sk-` and 12 hexadecimal digits
NO_KEY = (
    "There is no such key. Name it by its id, or by its beginning while it is valid: `srpo keys list`, or "
    "GET /v1/admin/keys, lists them. Keys of the settings end with their line there."
)


@dataclass(frozen=True, slots=True)
class StoredSecret:
    """One text that is a key until `expires`, in Unix seconds."""

    hash: str
    expires: float | None
    caller: Caller


@dataclass(frozen=True, slots=True)
class StoredKeys:
    """What the database says of keys: the secrets by their prefix, and whether it has ever had a key."""

    secrets: Mapping[str, StoredSecret]
    any: bool


def hash_key(key: str) -> str:
    """Keys have at least 128 random bits when they are made here, so there is no salt and no slow hash."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def prefix_of(key: str) -> str:
    """The public part of a key, if it is one of the database's."""
    return key[:PREFIX_LENGTH] if key[PREFIX_LENGTH : PREFIX_LENGTH + 1] == "-" else ""


class KeyStore:
    """The keys in a database, safe to use from several threads. Every method raises what `Database` does."""

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        """`now`: the date in Unix seconds, by which keys expire."""
        self._database = database
        self._now = now

    def add(
        self,
        name: str,
        scopes: tuple[Scope, ...] = ("generate",),
        expires: float | None = None,
        quota: Quota = Quota(),  # noqa: B008 - frozen
    ) -> tuple[KeyRecord, str]:
        """A new key, and its text, which nobody can be told again."""
        record = KeyRecord(
            f"key_{secrets.token_hex(8)}", name, list(scopes), self._now(), expires=expires, **asdict(quota)
        )
        text = self._add_secret(record)
        with self._database.transaction() as session:
            session.add(record)
        return record, text

    def list(self) -> list[KeyRecord]:
        """All keys, revoked ones too, in the order in which they were made."""
        with self._database.transaction() as session:
            return list(session.scalars(sa.select(KeyRecord).order_by(KeyRecord.created, KeyRecord.id)))

    def revoke(self, identity: str) -> KeyRecord:
        """End a key, and forget its hashes. Again: nothing to do. Raises `NotFound`."""
        with self._database.transaction() as session:
            record = find(session, identity)
            record.revoked = record.revoked or self._now()
            record.secrets.clear()
        return record

    def rotate(self, identity: str, grace: float = 0.0) -> tuple[KeyRecord, str]:
        """Another text for the same key; those before are valid for `grace` seconds more, or until they end anyway.

        Raises `NotFound`, for a revoked key too.
        """
        with self._database.transaction() as session:
            record = find(session, identity)
            if record.revoked is not None:
                raise NotFound("This key is revoked. Add a new one: `srpo keys add NAME`, or POST /v1/admin/keys.")
            now = self._now()
            record.secrets[:] = [secret for secret in record.secrets if grace and not is_over(secret.expires, now)]
            for secret in record.secrets:
                secret.expires = earlier(secret.expires, now + grace)
            text = self._add_secret(record)
        return record, text

    def read(self) -> StoredKeys:
        """What is valid now, to authenticate with."""
        records = self.list()
        now = self._now()
        return StoredKeys(
            {
                secret.prefix: StoredSecret(secret.hash, earlier(secret.expires, record.expires), caller_of(record))
                for record in records
                for secret in record.secrets
                if not is_over(earlier(secret.expires, record.expires), now)
            },
            any=bool(records),
        )

    def _add_secret(self, record: KeyRecord) -> str:
        prefix = f"sk-{secrets.token_hex(6)}"
        text = f"{prefix}-{secrets.token_urlsafe(32)}"
        record.secrets.append(KeySecret(prefix, record.id, hash_key(text), self._now()))
        return text


def find(session: Session, identity: str) -> KeyRecord:
    """By the key's id, by the prefix of its text, or by all of it. Raises `NotFound`."""
    prefix = prefix_of(identity) or identity
    by_prefix = sa.select(KeySecret.key_id).where(KeySecret.prefix == prefix).scalar_subquery()
    query = sa.select(KeyRecord).where(sa.or_(KeyRecord.id == identity, KeyRecord.id == by_prefix))
    record = session.scalars(query.with_for_update()).one_or_none()
    if record is None:
        raise NotFound(NO_KEY)
    return record


def caller_of(record: KeyRecord) -> Caller:
    quota = Quota(record.images_per_day, record.concurrent_requests, record.requests_per_minute)
    return Caller(record.id, frozenset(scope for scope in SCOPES if scope in (record.scopes or ())), quota)


def earlier(one: float | None, other: float | None) -> float | None:
    return min((moment for moment in (one, other) if moment is not None), default=None)


def is_over(expires: float | None, now: float) -> bool:
    return expires is not None and expires <= now


def describe_key(record: KeyRecord) -> dict[str, Any]:
    """A key as it is listed: never its text, never its hashes. Times are Unix seconds."""
    return {
        "id": record.id,
        "object": "key",
        "name": record.name,
        "prefixes": [secret.prefix for secret in record.secrets],
        "scopes": record.scopes or [],
        "created_at": int(record.created),
        "expires_at": None if record.expires is None else int(record.expires),
        "revoked_at": None if record.revoked is None else int(record.revoked),
        "images_per_day": record.images_per_day,
        "concurrent_requests": record.concurrent_requests,
        "requests_per_minute": record.requests_per_minute,
    }
