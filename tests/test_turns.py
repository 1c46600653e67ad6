"""Requests that come at the same time begin one after the other, and a probe waits for none of them."""

import asyncio
import itertools

from support.waiting import LIMIT

from server.transport.turns import Turns


async def test_one_begins_in_a_round_in_the_order_of_arrival() -> None:
    turns, begun = Turns(), list[int]()

    async def request(number: int) -> None:
        await turns.take()
        begun.append(number)

    requests = [asyncio.create_task(request(number)) for number in range(300)]
    seen = []
    while len(begun) < len(requests):
        await asyncio.sleep(0)
        seen.append(len(begun))
    assert begun == list(range(300))
    assert max(after - before for before, after in itertools.pairwise(seen)) == 1


async def test_who_leaves_while_waiting_takes_no_turn_and_stops_nobody() -> None:
    turns, begun = Turns(), list[int]()

    async def request(number: int) -> None:
        await turns.take()
        begun.append(number)

    requests = [asyncio.create_task(request(number)) for number in range(10)]
    await asyncio.sleep(0)
    for number in (1, 2, 9):
        requests[number].cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    assert begun == [0, 3, 4, 5, 6, 7, 8]
    await asyncio.wait_for(request(10), LIMIT)
    assert begun[-1] == 10


async def test_a_request_alone_waits_for_nothing() -> None:
    turns = Turns()
    for _ in range(3):
        beginning = turns.take()
        assert finishes_at_once(beginning)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def finishes_at_once(coroutine: object) -> bool:
    try:
        coroutine.send(None)  # type: ignore[attr-defined]
    except StopIteration:
        return True
    return False
