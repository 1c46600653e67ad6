"""One engine of a batch that many draw into a bucket. `make ray` tries the same with Ray."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
from support.buckets import S3Service
from support.command_line import srpo

from server.batch.items import BatchItem, make_item
from server.batch.lines import CannotGenerate, Line, read_lines
from server.cluster.offline_engine import OfflineEngine, choose_seed
from server.images.decoding import UnusableImage
from server.settings.engine import EngineSettings

ROOT = Path(__file__).parent.parent
FAST: dict[str, Any] = {"num_inference_steps": 1, "image_size": {"width": 512, "height": 512}, "output_format": "png"}
LINES = [
    json.dumps(FAST | {"prompt": "one", "seed": 1}),
    '{"prompt": ',
    json.dumps(FAST | {"prompt": "two", "seed": 2, "num_images": 2}),
    "",
    json.dumps(FAST | {"prompt": "three", "seed": 0}),
    json.dumps(FAST | {"prompt": "four"}),
    '["a list"]',
]


@asynccontextmanager
async def engine(s3: S3Service, bucket: str, factory: str | None = None) -> AsyncIterator[OfflineEngine]:
    one = OfflineEngine(EngineSettings(model="tiny", safety_checker="none"), bucket, s3.endpoint, factory)
    await one.load()
    try:
        yield one
    finally:
        await one.stop()


def files(s3: S3Service, bucket: str) -> dict[str, bytes]:
    handle = s3._handle(bucket)
    return {name: bytes(obstore.get(handle, name).bytes()) for name in s3.keys(bucket)}


@pytest.mark.long
async def test_a_batch_in_a_bucket_is_the_same_as_one_in_a_folder_and_goes_on_where_it_stopped(
    tmp_path: Path, s3: S3Service
) -> None:
    source, bucket = tmp_path / "in.jsonl", s3.create_bucket()
    source.write_text("\n".join(LINES))
    lines = list(read_lines(source))
    async with engine(s3, bucket) as one:
        outcomes = await one.draw(lines)
        drawn = files(s3, bucket)
        again = await one.draw(lines)
        changed = [*lines[:3], Line(4, FAST | {"prompt": "three", "seed": 3}), *lines[4:]]
        repaired = await one.draw(changed)
    assert set(drawn) == {"0001.png", "0003-1.png", "0003-2.png", "0005.png", "requests/0000001.jsonl"}
    assert [outcome.get("files") for outcome in outcomes] == [
        ["0001.png"],
        None,
        ["0003-1.png", "0003-2.png"],
        None,
        ["0005.png"],
        None,
    ]
    assert [outcome["line"] for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert "line 2: not JSON" in outcomes[1]["error"]
    assert "seed: expected an integer from 1 to" in outcomes[3]["error"]
    assert "line 7: expected a JSON object" in outcomes[5]["error"]
    assert not any(outcome.get("new") for outcome in again)
    assert [outcome["line"] for outcome in repaired if outcome.get("new")] == [4]
    assert drawn.items() <= (files(s3, bucket) | {name: drawn[name] for name in drawn if "requests" in name}).items()

    good = [text for text, line in zip(filter(None, LINES), lines, strict=True) if line.number in (1, 3)]
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    command = [sys.executable, "-m", "server", "generate", "--jsonl", "good.jsonl", "-o", "out"]
    flags = ["--model", "tiny", "--safety-checker", "none"]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    await asyncio.to_thread(subprocess.run, [*command, *flags], cwd=tmp_path, env=env, check=True, capture_output=True)
    folder = tmp_path / "out"
    assert (folder / "0001.png").read_bytes() == drawn["0001.png"]
    assert [(folder / f"0002-{index}.png").read_bytes() for index in (1, 2)] == [
        drawn[f"0003-{index}.png"] for index in (1, 2)
    ]


async def test_a_line_is_drawn_though_its_twin_is(s3: S3Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants: equal lines without a seed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # where the worker finds its engine
    lines = [Line(number, FAST | {"prompt": "a cat"}) for number in (1, 2)]
    async with engine(s3, s3.create_bucket(), factory="support.scripted_engine:load") as one:
        with monkeypatch.context() as patch:
            patch.setattr(one, "_draw_item", fail_first(one._draw_item))
            before = await one.draw(lines)
        after = await one.draw(lines)
    assert ["error" in outcome for outcome in before] == [True, False]
    assert [outcome.get("files") for outcome in after] == [["0001.png"], ["0002.png"]]
    assert [outcome.get("new") for outcome in after] == [True, None]


def fail_first(draw: Callable[[BatchItem], Awaitable[None]]) -> Callable[[BatchItem], Awaitable[None]]:
    async def failing(item: BatchItem) -> None:
        if item.names == ("0001.png",):
            raise UnusableImage("for a moment")
        await draw(item)

    return failing


@pytest.mark.parametrize("image", [5, None, ["a.png"], "a\0b.png"])
def test_what_names_no_file_is_the_fault_of_one_line(image: object) -> None:
    with pytest.raises(CannotGenerate, match="request 7: image: expected the path of a file"):
        make_item(7, {"prompt": "a cat", "image": image}, "tiny")


def test_a_line_without_a_seed_always_gets_the_same_one_and_another_line_another() -> None:
    line = Line(7, FAST | {"prompt": "any"})
    assert choose_seed(line) == choose_seed(Line(7, dict(reversed(line.fields.items()))))
    assert choose_seed(line) != choose_seed(Line(8, line.fields))
    assert choose_seed(Line(7, line.fields | {"seed": 3})) == {}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--ray", "a prompt", "-o", "s3://bucket/run"), "--ray draws the lines of --jsonl"),
        (("--ray", "--jsonl", "in.jsonl", "-o", "out"), "give a bucket"),
        (("--jsonl", "in.jsonl", "-o", "s3://bucket/run"), "only --ray draws into a bucket"),
        (("--ray", "--jsonl", "in.jsonl", "-o", "s3://bucket/run"), "needs credentials in the environment"),
    ],
)
def test_what_a_batch_over_engines_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    ended = srpo("generate", *arguments, "--model", "tiny")
    assert ended.returncode == 2
    assert complaint in ended.stderr, ended.stderr
