"""An S3 service on a loopback port (moto's), and buckets in it.

moto is imported where a service starts: that takes seconds, and most processes of the tests start none.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, NoReturn

import obstore
import pytest
from obstore.store import S3Store as Bucket

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "s3-Canary-9x2Lm",
    "AWS_REGION": "us-east-1",
}
ACCOUNT = "123456789012"  # moto's


class S3Service:
    """The service, in this process. It checks no signatures."""

    def __init__(self) -> None:
        from moto.s3.models import s3_backends
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._backend = s3_backends[ACCOUNT]["aws"]
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.port: int = self._server.get_host_and_port()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._names = count(1)

    def stop(self) -> None:
        self._server.stop()

    def create_bucket(self) -> str:
        """The URL of a new one, with a prefix."""
        name = f"bucket-{next(self._names)}"
        self._backend.create_bucket(name, "us-east-1")
        return f"s3://{name}/some/prefix"

    @contextmanager
    def without_bucket(self, url: str) -> Iterator[None]:
        """Delete the bucket with all that is in it; then there is a new one of the same name."""
        name = url.removeprefix("s3://").partition("/")[0]
        self._backend.get_bucket(name).keys.clear()
        self._backend.delete_bucket(name)
        yield
        self._backend.create_bucket(name, "us-east-1")

    def keys(self, url: str) -> list[str]:
        """What is in the bucket, below the prefix."""
        return sorted(item["path"] for batch in obstore.list(self._handle(url)) for item in batch)

    def age(self, url: str, key: str, seconds: float) -> None:
        """Let an object have been stored that long ago."""
        from moto.core.utils import utcnow

        name, _, prefix = url.removeprefix("s3://").partition("/")
        found = self._backend.get_object(name, f"{prefix}/{key}")
        assert found is not None
        found.last_modified = utcnow() - timedelta(seconds=seconds)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Refuse whatever is put, as a bucket does whose quota is used up, and give what is there."""
        from moto.s3.exceptions import S3AccessDeniedError

        def refuse(*_: object, **__: object) -> NoReturn:
            raise S3AccessDeniedError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self._backend), "put_object", refuse)
            yield

    def _handle(self, url: str) -> Bucket:
        name, _, prefix = url.removeprefix("s3://").partition("/")
        options: dict[str, Any] = {"client_options": {"allow_http": True}, "region": "us-east-1"}
        keys: dict[str, Any] = {"access_key_id": "a", "secret_access_key": "b"}
        return Bucket(name, prefix=prefix, endpoint=self.endpoint, **keys, **options)


@contextmanager
def running_s3() -> Iterator[S3Service]:
    before = {name: os.environ.get(name) for name in CREDENTIALS}
    os.environ.update(CREDENTIALS)  # obstore reads them itself
    service = S3Service()
    try:
        yield service
    finally:
        service.stop()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
