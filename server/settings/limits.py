"""How much clients may take of the server: its requests, connections, bytes and time. Part of the settings."""

from pydantic import Field

from server.settings.types import Bytes, EnvironmentSettings, Seconds, WholeSeconds

SOURCE_MEMORY = 2**26  # bytes
MAX_KEY_TIME = 10 * 365 * 86400  # seconds a key or its old text may be valid: its end must be a date to show
MAX_RATE = 10_000  # requests a minute: each is remembered for so long


class LimitSettings(EnvironmentSettings):
    """Limits."""

    queue_size: int = Field(64, ge=0, description="requests that may wait; one more is answered with 429")
    max_running: int = Field(16, ge=1, description="requests that are drawn at the same time, step by step in turn")
    key_requests: int | None = Field(
        None,
        ge=1,
        description="requests of one key that may be unfinished at a time; one more is answered with 429; none: three "
        "quarters of the requests that may wait or run",
    )
    key_images: int | None = Field(
        None,
        ge=1,
        description="images a key may have in a day of UTC, where the key itself has no quota; beyond them 403; none: "
        "any number",
    )
    key_rate: int | None = Field(
        None,
        ge=1,
        le=MAX_RATE,
        description="requests for images a key may send within a minute, where the key itself has no rate; beyond them "
        "429; none: any number",
    )
    key_delay: Seconds = Field(
        5.0,
        ge=0,
        description="longest wait, in seconds, before a wrong key is refused once many came from its address; 0: none",
    )
    request_timeout: Seconds = Field(
        600.0, gt=0, description="seconds a request may take, waiting included, then the answer is 504"
    )
    header_timeout: Seconds = Field(
        10.0, gt=0, description="seconds a client may take to send a request's headers, from its first byte on"
    )
    max_connections: int = Field(
        1000, ge=1, description="connections that may be open; one more takes the place of the longest idle one"
    )
    body_timeout: Seconds = Field(30.0, gt=0, description="seconds a client may take to send a request's body")
    shutdown_grace: WholeSeconds = Field(60, ge=0, description="seconds that unfinished requests get at shutdown")
    max_body: Bytes = Field(2**24, ge=1024, description="size limit of a request body, in bytes or with a unit (16MiB)")
    max_upload: Bytes = Field(
        50 * 2**20, ge=1024, description="size limit of the picture in a form to /v1/images/edits, as for max_body"
    )
    source_memory: Bytes = Field(
        SOURCE_MEMORY,
        ge=2**24,
        description="memory that decoding a source picture may take (64MiB) beyond its own pixels; one that needs more "
        "is shrunk while it is decoded, or refused",
    )
    uploads: Bytes = Field(
        2**28,
        ge=2**20,
        description="bytes that the bodies of all requests may take together (256MiB), in memory and in temporary "
        "files, until they are decoded; small ones are not counted",
    )
