"""What the safety checker withholds is nowhere: every policy, action and road, end to end over HTTP.

The pool returns the checker's own canaries, so the pixels that must not be found are known to the last byte.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
from support.canaries import decode, found_in, kept_in, talking, traces_of

from pipelines.safety.checkers import SafetyChecker
from pipelines.safety.guard import ACTIONS, POLICIES, Guard, blur
from pipelines.safety.open_nsfw import canaries, load_open_nsfw

SLOTS = (False, True)
PATH = "/v1/images/generations"
BODY = {"model": "flux/srpo", "prompt": "x", "num_images": 2, "image_size": "square", "output_format": "png", "seed": 5}
PREFER = {"prefer": "respond-async"}
ROADS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {  # fields, headers
    "url": ({}, {}),
    "base64": ({"response_format": "b64_json"}, {}),
    "data URI": ({"sync_mode": True}, {}),
    "stream": ({"stream": True, "partial_images": 3}, {}),
    "stream of base64": ({"stream": True, "response_format": "b64_json"}, {}),
    "job": ({"partial_images": 3}, PREFER),
    "job of base64": ({"response_format": "b64_json"}, PREFER),
    "key": ({}, {"idempotency-key": "once"}),
}


@pytest.fixture(scope="module")
def checker() -> SafetyChecker:
    return load_open_nsfw()


async def walk(client: Any, road: str, **fields: Any) -> tuple[bytes, int]:
    """Everything a client can read on one road, and the status it was told at first."""
    own, headers = ROADS[road]
    reply = await client.post(PATH, json=BODY | own | fields, headers=headers)
    read = [reply.content]
    if reply.status_code == 202:
        job = reply.json()
        read.append((await client.get(job["events_url"])).content)  # until it has ended
        read += [(await client.get(path)).content for path in (job["poll_url"], "/v1/jobs")]
    elif "idempotency-key" in headers:
        read.append((await client.post(PATH, json=BODY | own | fields, headers=headers)).content)
    return b"\n".join(read), reply.status_code


def events(told: bytes, name: str) -> list[dict[str, Any]]:
    blocks = told.decode().split("\n\n")
    return [json.loads(block.partition("data: ")[2]) for block in blocks if f"event: {name}\n" in block]


def is_checked(policy: str, wanted: bool) -> bool:
    return policy == "always" or (policy == "client" and wanted)


@pytest.mark.parametrize(
    ("policy", "wanted", "action"),
    [
        (policy, wanted, action)
        for policy, wanted, action in product(POLICIES, (True, False), ACTIONS)
        if is_checked(policy, wanted) or action in ("black", "flag")  # what is not checked has no action
    ],
)
async def test_only_what_may_be_shown_is_anywhere(
    tmp_path: Path, checker: SafetyChecker, capfd: Any, policy: str, wanted: bool, action: str
) -> None:
    checked = is_checked(policy, wanted)
    withheld = checked and action != "flag"
    bad, good = (picture.tobytes() for picture in canaries(512, 512))
    instead = {"blur": blur(canaries(512, 512)[0]).tobytes()}.get(action, bytes(512 * 512 * 3)) if withheld else bad
    files = set()
    async with talking(tmp_path, Guard(checker, 0.5, policy, action), SLOTS) as client:
        for road in ROADS:
            told, status = await walk(client, road, enable_safety_checker=wanted)
            assert status == (202 if "job" in road else 200 if "stream" in road else 201), road
            files |= found_in(told)
            if "stream" in road or "job" in road:
                flags = [data["has_nsfw_concepts"] for data in events(told, "image_generation.completed")]
                assert flags == [flag and checked for flag in SLOTS], road
                sides = {data["width"] for data in events(told, "image_generation.partial_image")}
                assert sides <= {32 if withheld else 192}, road
                assert bool(sides) is ("partial_images" in ROADS[road][0]), road
            else:
                body = json.loads(told.partition(b"\n")[0])
                assert body["has_nsfw_concepts"] == [flag and checked for flag in SLOTS], road
                assert body["safety"]["checked"] is checked, road
    whole = {pixels for pixels in files if len(pixels) == len(bad)}
    assert whole == {good, instead}
    kept, logged = kept_in(tmp_path), "".join(capfd.readouterr()).encode("utf-8", "surrogateescape")
    assert found_in(kept) == {good, instead}
    assert found_in(logged) == set()
    traces = traces_of(canaries(512, 512)[0])
    assert any(trace in kept for trace in traces) is not withheld
    assert not any(trace in logged for trace in traces)


async def test_when_every_image_is_flagged_the_error_action_leaves_nothing(
    tmp_path: Path, checker: SafetyChecker, capfd: Any
) -> None:
    async with talking(tmp_path, Guard(checker, 0.5, "client", "error"), (True, True)) as client:
        for road in ROADS:
            told, status = await walk(client, road)
            assert status == (202 if "job" in road else 200 if "stream" in road else 400), road
            assert b'"content_policy_violation"' in told, road
            assert {len(pixels) for pixels in found_in(told)} <= {32 * 32 * 3}, road
    assert found_in(kept_in(tmp_path)) == set()
    assert found_in("".join(capfd.readouterr()).encode("utf-8", "surrogateescape")) == set()


@pytest.mark.parametrize("format", ["jpeg", "webp"])
async def test_a_withheld_slot_keeps_its_place_size_and_format(
    tmp_path: Path, checker: SafetyChecker, format: str
) -> None:
    async with talking(tmp_path, Guard(checker, 0.5, "client", "black"), (False, True, False, False)) as client:
        fields = {"num_images": 4, "output_format": format, "image_size": {"width": 576, "height": 512}}
        reply = (await client.post(PATH, json=BODY | fields)).json()
        shown = [decode((await client.get(item["url"])).content) for item in reply["images"]]
    assert reply["has_nsfw_concepts"] == [False, True, False, False]
    assert [picture.size for picture in shown] == [(576, 512)] * 4
    assert [picture.format for picture in shown] == [format.upper()] * 4
    ranges = [cast(tuple[tuple[int, int], ...], picture.convert("RGB").getextrema()) for picture in shown]  # by channel
    brightest = [max(high for _, high in channels) for channels in ranges]
    assert [value < 4 for value in brightest] == [False, True, False, False]
