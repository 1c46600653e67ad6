"""What a worker says arrives whole, in whatever pieces its pipe brings it."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.workers.process import READ_AHEAD, MessageReader
from pipelines.workers.protocol import Message

sizes = st.one_of(st.integers(0, 100), st.integers(READ_AHEAD - 100, 3 * READ_AHEAD))


def feed(reader: MessageReader, data: bytes, piece: int) -> None:
    while data and not reader.ended.done():
        buffer = reader.get_buffer(-1)
        count = min(piece, len(buffer), len(data))
        assert count > 0
        buffer[:count], data = data[:count], data[count:]
        buffer.release()
        reader.buffer_updated(count)


@given(st.lists(sizes, max_size=5), st.integers(1, 2 * READ_AHEAD))
async def test_messages_are_whole_however_they_arrive(payloads: list[int], piece: int) -> None:
    sent = [Message({"number": number}, bytes([number]) * size) for number, size in enumerate(payloads)]
    heard: list[Message] = []
    reader = MessageReader(heard.append, lambda error: None)
    feed(reader, b"".join(message.encode() + message.payload for message in sent), max(piece, sum(payloads) // 50))
    assert heard == sent
    assert not reader.ended.done()


async def test_nothing_is_heard_after_a_message_that_cannot_be_handled() -> None:
    heard: list[Message] = []
    failures: list[Exception] = []

    def hear(message: Message) -> None:
        heard.append(message)
        raise KeyError("event")

    reader = MessageReader(hear, failures.append)
    feed(reader, Message({}).encode() * 3, 7)
    assert len(heard) == 1
    assert [type(error) for error in failures] == [KeyError]
    assert reader.ended.done()


async def test_what_is_no_message_is_a_failure() -> None:
    failures: list[Exception] = []
    reader = MessageReader(lambda message: None, failures.append)
    feed(reader, b"\x02\0\0\0" + bytes(8) + b"{x", 100)
    assert len(failures) == 1
    reader.eof_received()
    assert reader.ended.done()
