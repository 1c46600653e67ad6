"""The comparison of two versions: what differs at every run is passed over, everything else is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.behaviour.__main__ import main
from bench.behaviour.server import describe_events, strip_volatile


def compare(folder: Path, old: Any, new: Any) -> int:
    for name, value in (("old", old), ("new", new)):
        (folder / name).write_text(json.dumps(value))
    return main(["compare", str(folder / "old"), str(folder / "new")])


def test_equal_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, {"health": {"status": "200 OK"}}, {"health": {"status": "200 OK"}}) == 0
    assert capsys.readouterr().out == "1 recordings are equal\n"


def test_each_difference_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"gone": 1, "an image": {"body": {"images": [{"width": 512}], "seed": 7}}, "order": {"a": 1, "b": 2}}
    new = {"order": {"b": 2, "a": 1}, "an image": {"body": {"images": [{"width": 544}], "seed": 7}}, "more": 2}
    assert compare(tmp_path, old, new) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line[0] != " "] == [
        "an image > body > images > 0 > width: was 512",
        "gone: missing, was 1",
        "more: new, is 2",
        "order: order was a, b; is b, a",
    ]


def test_what_differs_at_every_run() -> None:
    def reply(digit: str, port: int) -> dict[str, Any]:
        url = f"http://127.0.0.1:{port}/files/-{digit * 31}.png"
        return {"requestId": digit * 32, "created": port, "timings": {"queue": port / 7, "notes": ["a"]}, "url": url}

    assert strip_volatile(reply("a", 8000)) == strip_volatile(reply("b", 8001))
    assert strip_volatile(reply("a", 8000))["timings"]["notes"] == ["a"]
    assert strip_volatile({"seed": 1}) != strip_volatile({"seed": 2})


def test_events_do_not_depend_on_how_many_were_read() -> None:
    def progress(step: int) -> str:
        data = {"stage": "denoise", "image_index": 0, "step": step, "eta_seconds": 1 / step}
        return f"event: image_generation.progress\nid: abc-{step}\ndata: {json.dumps(data)}\n\n"

    end = 'event: image_generation.completed\nid: abc-9\ndata: {"seed": 7}\n\n'
    assert describe_events(progress(1) + progress(2) + end) == describe_events(progress(2) + ": still here\n\n" + end)
    assert describe_events(progress(1) + end) != describe_events(progress(1))
