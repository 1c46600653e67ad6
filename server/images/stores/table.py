"""Opens the store that a URL means: what the rows of `STORES` name."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.imports import import_name
from server.images.stores.base import Retention, Store
from server.images.stores.local import LocalStore
from server.images.stores.s3 import S3Store
from server.settings.server import Settings
from server.settings.storage import STORES


def open_local(settings: Settings, clock: Callable[[], float]) -> Store:
    """The folder of `file:` URLs; without any the data folder."""
    path = urlsplit(settings.store_url or "").path
    root = Path(unquote(path)) if path else settings.data_dir
    return LocalStore(root, retention_of(settings), clock, settings.link_lifetime, settings.link_secrets)


def open_s3(settings: Settings, clock: Callable[[], float]) -> Store:  # noqa: ARG001 - the bucket has its own
    assert settings.store_url is not None
    return S3Store(
        settings.store_url,
        retention_of(settings),
        os.environ,
        endpoint=settings.store_endpoint,
        signed_urls=settings.store_links == "signed",
        link_lifetime=settings.link_lifetime,
        link_secrets=settings.link_secrets,
    )


def open_store(settings: Settings, clock: Callable[[], float]) -> Store:
    """The store that the settings name, tried. `clock` is the data folder's, which no change of the date moves.

    Raises `ValueError` or `OSError` where it cannot be used, `StoreUnavailable` where it cannot be reached now.
    """
    store: Store = import_name(STORES[urlsplit(settings.store_url or "file:").scheme].factory)(settings, clock)
    return store


def retention_of(settings: Settings) -> Retention:
    return Retention(settings.images_expire, settings.images_cap)
