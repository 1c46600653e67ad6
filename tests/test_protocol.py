"""What is said of a job means the same at the other end, and nothing else is taken for it."""

import pytest

from pipelines.request import Stage, Timings
from pipelines.workers.protocol import (
    PREFIX,
    ImageReady,
    JobDone,
    JobEvent,
    JobFailed,
    Message,
    PreviewReady,
    ProtocolError,
    StepDone,
    decode_event,
    encode_event,
)

EVENTS: list[JobEvent] = [
    StepDone("a", "text", 0, 0, 1.0),
    StepDone("a", "denoise", 1, 3, 0.25, seconds=0.5, batch=2),
    PreviewReady("a", 0, 1, 2, 1, b"\x00\xff" * 3),
    ImageReady("a", 1, bytes(range(12))),
    JobDone("a", Timings(0.1, 0.2, 0.3, 0.4, 0.5), (Stage("text", 0.0, 1.5),), ("a remark",)),
    JobFailed("a", "OutOfMemory"),
]


def through_the_pipe(message: Message) -> Message:
    sent = message.encode()
    header, payload = PREFIX.unpack(sent[: PREFIX.size])
    assert (header, payload) == (len(sent) - PREFIX.size, len(message.payload))
    return Message.decode(sent[PREFIX.size :], message.payload)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_arrives_as_it_was_sent(event: JobEvent) -> None:
    assert decode_event(through_the_pipe(encode_event(event))) == event


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_missing_field_is_refused_and_one_of_a_later_version_left_out(event: JobEvent) -> None:
    header, payload = encode_event(event)
    for name in header.keys() - {"seconds", "batch"}:  # of a step in which nothing was measured
        with pytest.raises(ProtocolError):
            decode_event(Message({key: value for key, value in header.items() if key != name}, payload))
    later = {"colour": 1} | ({"stages": [[*stage, 1] for stage in header["stages"]]} if "stages" in header else {})
    assert decode_event(Message(header | later, payload)) == event


@pytest.mark.parametrize("header", [{}, {"event": "loading"}, {"event": ["step"]}, {"event": "done", "job": "a"}])
def test_what_is_no_event_of_a_job_is_refused(header: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        decode_event(Message(header))
