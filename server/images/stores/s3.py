"""Images in an S3 bucket, which several servers share, through obstore. Needs the extra `s3`.

Credentials come from the environment only, by AWS' own names, and nothing else is asked for them. The secret of the
names is in the bucket too: the first server puts it there, unless one is there already.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from math import inf
from typing import Any
from urllib.parse import urlsplit

import structlog

from server.errors import Gone, StorageFailure, StoreUnavailable
from server.extras import missing_extra
from server.images.encoding import EncodedImage
from server.images.stores.base import (
    PROBE_SIZE,
    SECRET_BYTES,
    SECRET_NAME,
    FoundImage,
    ImageNames,
    Retention,
    StoredImage,
    make_links,
)
from server.images.stores.bucket_folder import BucketFolder, put_at
from server.process.backoff import pauses
from server.process.data_folder import seconds_since_boot

INSTALL = missing_extra("an s3:// store", "s3")
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
FOLDER = "images/"  # below the prefix
PROBE = FOLDER + "probe-"  # begins names among the images, so that it expires as they do where it cannot be deleted
CONNECT_TIMEOUT, TIMEOUT = timedelta(seconds=3), timedelta(seconds=10)  # of one try
PATIENCE = 30.0  # seconds for which a finished image is tried to be put
PAUSE, MAX_PAUSE = 0.1, 2.0  # seconds between tries
SWEEP_EVERY = 600.0  # seconds; a sweep lists the bucket
SIGNED_FOR = 300.0  # seconds
log = structlog.get_logger("srpo")


class S3Store:
    """A `Store`: images in `url`, `s3://BUCKET/PREFIX`. Raises `ValueError` where it cannot be used.

    `signed_urls`: clients fetch images from the bucket itself. Ages are by the bucket's clock, which each sweep asks
    for: a server whose date is wrong deletes nobody's images.
    """

    def __init__(
        self,
        url: str,
        retention: Retention,
        environment: Mapping[str, str],
        *,
        endpoint: str | None = None,
        signed_urls: bool = False,
        link_lifetime: float | None = None,
        link_secrets: Sequence[str] = (),
    ) -> None:
        self.place = url
        self.cap = retention.cap
        self.failure: StorageFailure | None = None
        self._bucket_missed = False
        self._expire = retention.expire
        self._signed_urls = signed_urls
        self._size = 0
        self._next_sweep = self._failing_since = time.monotonic()
        self._probe_key = PROBE + secrets.token_hex(8)  # no other server deletes it
        self._offset: float | None = None  # from the seconds since this machine's start to the bucket's clock
        self._obstore, self._bucket = open_bucket(url, endpoint, environment)
        self.origin = self._find_origin() if signed_urls else None
        self._make_links = partial(make_links, link_lifetime, link_secrets)
        self._use(self._open())
        self._ask_time()

    @property
    def size(self) -> int:
        return self._size

    def put(self, image: EncodedImage, base_url: str) -> StoredImage:
        """Store an image, with as many tries as `PATIENCE` allows. Raises `StoreUnavailable`.

        A bucket that has been away for as long is tried once: many images may wait for these threads.
        """
        name = self._names.make(image.format)
        end, waits = time.monotonic() + PATIENCE, pauses(PAUSE, MAX_PAUSE)
        while True:
            try:
                self._create(key_of(name), image.data, image.content_type)
                break
            except StoreUnavailable as error:
                self._fail(error)
                pause = next(waits)
                if time.monotonic() + pause > min(end, self._failing_since + PATIENCE):
                    raise
            time.sleep(pause)
        self.failure = None
        self._size += len(image.data)
        return StoredImage(name, self.links.make(base_url, name))

    def read(self, name: str) -> FoundImage:
        content_type = self._names.check(name)
        with self._translated_errors():
            found = self._obstore.get(self._bucket, key_of(name))
            left = self._seconds_left(found.meta)
            return FoundImage(bytes(found.bytes()), content_type, left)

    def sign_url(self, name: str, method: str, seconds: float) -> str | None:
        if not self._signed_urls:
            return None
        self._names.check(name)
        with self._translated_errors():
            left = self._seconds_left(self._obstore.head(self._bucket, key_of(name)))
            lifetime = timedelta(seconds=max(1, int(min(SIGNED_FOR, left, seconds))))
            url: str = self._obstore.sign(self._bucket, method, key_of(name), lifetime)
            return url

    def maintain(self) -> None:
        if self._size > self.cap or time.monotonic() > self._next_sweep:
            self.sweep()
        if self._bucket_missed:  # what is there again is a new one, in which images may have been put already
            self._use(self._load_secret(self._secret))
            self._bucket_missed = False
        if self.failure is not None:  # something as large as an image: a bucket that may be read says nothing of that
            self._probe(PROBE_SIZE)
            self.failure = None

    def _probe(self, size: int = 0) -> None:
        """Put so many bytes, and learn from them what time it is in the bucket. Raises `StoreUnavailable`.

        The time is early by what the answer took and by the part of a second that buckets leave out, so that nothing
        expires too soon.
        """
        with self._translated_errors():
            try:
                self._obstore.put(self._bucket, self._probe_key, bytes(size), use_multipart=False)
                put = seconds_since_boot()
                self._offset = self._obstore.head(self._bucket, self._probe_key)["last_modified"].timestamp() - put
            except FileNotFoundError as error:  # somebody empties the bucket, or deletes it
                raise self._miss_bucket() from error
        with suppress(FileNotFoundError, self._obstore.exceptions.BaseError):  # else it expires
            self._obstore.delete(self._bucket, self._probe_key)

    def _ask_time(self) -> None:
        """Where nothing can be put, the time goes on from when something could."""
        try:
            self._probe()
        except StoreUnavailable as error:
            self._fail(error)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._names = ImageNames(secret)
        self.links = self._make_links(secret, self._now)

    def _fail(self, error: StoreUnavailable) -> None:
        if self.failure is None:
            self._failing_since = time.monotonic()
        self.failure = error

    def _now(self) -> float:
        """The bucket's time; this machine's date as long as nothing could be put."""
        return time.time() if self._offset is None else self._offset + seconds_since_boot()

    def sweep(self) -> None:
        """Delete expired images, then the oldest until the rest fits the cap. Several servers may do it at a time."""
        self._ask_time()
        oldest_allowed = -inf if self._offset is None else self._now() - self._expire
        with self._translated_errors():
            self._size = BucketFolder(self._obstore, self._bucket, FOLDER).sweep(oldest_allowed, self.cap)
        self._next_sweep = time.monotonic() + SWEEP_EVERY

    def _seconds_left(self, meta: Mapping[str, Any]) -> float:
        left = put_at(meta) + self._expire - self._now()
        if left <= 0:
            raise Gone
        return left

    def _create(self, key: str, data: bytes, content_type: str) -> None:
        """Put an object where none is. One that is there stays: names are ours alone, so an earlier try put it.

        Raises `StoreUnavailable`, also where there is no bucket any more.
        """
        options: dict[str, Any] = {"mode": "create", "use_multipart": False}
        with self._translated_errors(), suppress(self._obstore.exceptions.AlreadyExistsError):
            try:
                self._obstore.put(self._bucket, key, data, attributes={"Content-Type": content_type}, **options)
            except FileNotFoundError as error:
                raise self._miss_bucket() from error

    def _miss_bucket(self) -> StoreUnavailable:
        """There is no bucket of this name, or none any more."""
        self._bucket_missed = True
        log.error("image_store", error="NoSuchBucket")
        return StoreUnavailable()

    def _find_origin(self) -> str:
        parts = urlsplit(self._obstore.sign(self._bucket, "GET", SECRET_NAME, timedelta(seconds=SIGNED_FOR)))
        return f"{parts.scheme}://{parts.netloc}"

    def _open(self) -> bytes:
        """The bucket's secret. Raises `ValueError` where the bucket will not be there later either."""
        refusals = (self._obstore.exceptions.PermissionDeniedError, self._obstore.exceptions.UnauthenticatedError)
        try:
            return self._load_secret(secrets.token_bytes(SECRET_BYTES))
        except StoreUnavailable as error:
            if isinstance(error.__cause__, FileNotFoundError):
                advice = "make it, or correct SRPO_STORE_URL or SRPO_STORE_ENDPOINT"
                raise ValueError(f"{self.place}: there is no such bucket: {advice}") from error
            if isinstance(error.__cause__, refusals):
                raise ValueError(
                    f"{self.place} does not let this server in: {type(error.__cause__).__name__}"
                ) from error
            raise

    def _load_secret(self, new: bytes) -> bytes:
        """The secret that all servers of this bucket have: `new` where there is none yet."""
        with self._translated_errors():
            try:
                return bytes(self._obstore.get(self._bucket, SECRET_NAME).bytes())
            except FileNotFoundError:
                pass
        self._create(SECRET_NAME, new, "application/octet-stream")
        with self._translated_errors():
            return bytes(self._obstore.get(self._bucket, SECRET_NAME).bytes())

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """obstore's errors as ours. What they say holds addresses, so only their class is logged."""
        try:
            yield
        except FileNotFoundError:
            raise Gone from None
        except self._obstore.exceptions.BaseError as error:
            log.error("image_store", error=type(error).__name__)
            raise StoreUnavailable from error


def key_of(name: str) -> str:
    """The path below the prefix. Two letters of the name keep listings by hand readable."""
    return f"{FOLDER}{name[:2]}/{name}"


def open_bucket(url: str, endpoint: str | None, environment: Mapping[str, str]) -> tuple[Any, Any]:
    """obstore, and its handle of the bucket. Nothing is connected yet."""
    try:
        import obstore
        from obstore.store import S3Store as Bucket
    except ModuleNotFoundError:
        raise ValueError(INSTALL) from None
    if not any(environment.get(name) for name in CREDENTIALS):  # else obstore would ask the machine's own network
        raise ValueError(f"{url} needs credentials in the environment, such as {CREDENTIALS[0]}")
    parts = urlsplit(url)
    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    bucket = Bucket(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        client_options={"connect_timeout": CONNECT_TIMEOUT, "timeout": TIMEOUT, "allow_http": is_plain(endpoint)},
        retry_config={"max_retries": 2, "retry_timeout": TIMEOUT},
        **options,
    )
    return obstore, bucket


def is_plain(endpoint: str | None) -> bool:
    """Whether the operator named an address without TLS."""
    return endpoint is not None and endpoint.startswith("http://")
