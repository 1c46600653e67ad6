"""Messages on the pipe between the pool and a worker: a small JSON header, then raw bytes.

Layout: header length (4 bytes), payload length (8 bytes), both little-endian unsigned, header (UTF-8 JSON), payload.
What a worker says of a job is one of `JobEvent`, in either direction; an engine of a cluster says the same. While a
cluster is updated its engines and servers are of two versions: a later one may say more, never less, and a field that
is new has a default.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from pipelines.request import Stage, Timings

PREFIX = struct.Struct("<IQ")


class Message(NamedTuple):
    header: dict[str, Any]
    payload: bytes = b""

    def encode(self) -> bytes:
        """Prefix and header; the payload follows on the wire as it is."""
        text = json.dumps(self.header, separators=(",", ":")).encode()
        return PREFIX.pack(len(text), len(self.payload)) + text

    @classmethod
    def decode(cls, header: bytes, payload: bytes) -> "Message":
        return cls(json.loads(header), payload)


class ProtocolError(ValueError):
    """A message that is no event of a job, or not with the fields of one."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A job got on: the `stage` text or decode begins, or a step of denoise was taken, `step` from 1.

    `remaining_fraction` of the job's steps are left. A pass of `batch` samples took `seconds`; `batch` is 0 for all of
    its samples but one.
    """

    job: str
    stage: str
    image: int
    step: int
    remaining_fraction: float
    seconds: float = 0.0
    batch: int = 0


@dataclass(frozen=True, slots=True)
class PreviewReady:
    """Preview `index` of an image, from 0: 8-bit RGB, row-major."""

    job: str
    image: int
    index: int
    width: int
    height: int
    pixels: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageReady:
    """A finished image of the request's size: 8-bit RGB, row-major."""

    job: str
    image: int
    pixels: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class JobDone:
    """All images were sent."""

    job: str
    timings: Timings
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobFailed:
    """`error` is a key of `pipelines.errors.FAILURES`."""

    job: str
    error: str


JobEvent = StepDone | PreviewReady | ImageReady | JobDone | JobFailed
EVENT_NAMES: dict[type[JobEvent], str] = {
    StepDone: "step",
    PreviewReady: "preview",
    ImageReady: "image",
    JobDone: "done",
    JobFailed: "failed",
}


def known_fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Of what another version has sent, what this one's dataclass `kind` has a field for. Pixels are no part of it."""
    return {field.name: data[field.name] for field in fields(kind) if field.name in data}


def encode_event(event: JobEvent) -> Message:
    """Pixels are the payload."""
    header = {"event": EVENT_NAMES[type(event)], **asdict(event)}
    return Message(header, header.pop("pixels", b""))


def decode_event(message: Message) -> JobEvent:
    """Raises `ProtocolError`, also where a field is missing. Fields of a later version are left out."""
    header, payload = message
    try:
        match header["event"]:
            case "step":
                return StepDone(**known_fields(StepDone, header))
            case "preview":
                return PreviewReady(**known_fields(PreviewReady, header), pixels=payload)
            case "image":
                return ImageReady(**known_fields(ImageReady, header), pixels=payload)
            case "done":
                timings, notes = Timings(**known_fields(Timings, header["timings"])), tuple(header["notes"])
                stages = tuple(Stage(*stage[: len(Stage._fields)]) for stage in header["stages"])
                return JobDone(header["job"], timings, stages, notes)
            case "failed":
                return JobFailed(**known_fields(JobFailed, header))
            case other:
                raise ProtocolError(f"no event of a job is called {other!r}")
    except (KeyError, TypeError) as error:
        raise ProtocolError(f"{header.get('event')!r} has not the fields of such an event: {error}") from error
