"""`srpo generate`: the engine without HTTP."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image
from support.command_line import srpo
from support.server import START_LIMIT, LiveServer

from bench.support.instant import InstantPool, draw_black
from pipelines.engine.base import EngineConfig
from server.cli.generate import command, offline
from server.cli.generate.batch import add_parameter_flags, plan_batch
from server.cli.terminal.parsing import parse
from server.cli.terminal.text import choose_renderer

SURROUNDINGS = {
    "PATH": "/usr/bin:/bin",
    "PYTHONPATH": str(Path(__file__).parent.parent),
    "SRPO_MODEL": "tiny",
    "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],  # another number of threads is another fingerprint, other bytes
}
FAST = ("--num-inference-steps", "1", "--image-size", "512x544")


def generate(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", "generate", *arguments],
        cwd=folder,
        env=SURROUNDINGS | env,
        capture_output=True,
        text=True,
        timeout=START_LIMIT,
    )


@pytest.mark.long
def test_one_prompt_into_one_file_equals_the_servers_picture(tmp_path: Path, live: LiveServer) -> None:
    ended = generate(tmp_path, "a red apple", "-o", "apple.png", "--seed", "9", *FAST)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "apple.png (seed 9)\n"
    assert "the embedded model" in ended.stderr
    size = {"width": 512, "height": 544}
    reply = live.generate(prompt="a red apple", seed=9, image_size=size, output_format="png")
    assert (tmp_path / "apple.png").read_bytes() == httpx.get(reply.json()["images"][0]["url"]).content


@pytest.mark.long
def test_a_file_of_requests_into_a_folder_resumes_where_it_stopped(tmp_path: Path) -> None:
    requests = [
        {"prompt": "one", "num_images": 2},
        {"prompt": "two", "size": "640x512", "output_format": "webp"},
        {"prompt": "three", "seed": 3},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, requests)))
    first = generate(tmp_path, "--jsonl", "in.jsonl", "-o", "out", *FAST)
    assert first.returncode == 0, first.stderr
    names = ["0001-1.jpeg", "0001-2.jpeg", "0002.webp", "0003.jpeg"]
    files = {name: tmp_path / "out" / name for name in names}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*names, "requests.jsonl"}
    ordinary = (tmp_path / "in.jsonl").stat().st_mode
    assert {file.stat().st_mode for file in files.values()} == {ordinary}  # not a server's private files
    kept = files["0001-1.jpeg"].stat().st_mtime_ns
    files["0003.jpeg"].unlink()
    with (tmp_path / "out" / "requests.jsonl").open("a") as record:
        record.write('{"request": {"prom')  # a line that a kill cut short
    second = generate(tmp_path, "--jsonl", "in.jsonl", "-o", "out", *FAST)
    assert second.stdout == "out/0003.jpeg (seed 3)\n", second.stderr
    assert files["0001-1.jpeg"].stat().st_mtime_ns == kept
    assert "everything is drawn already" in generate(tmp_path, "--jsonl", "in.jsonl", "-o", "out", *FAST).stderr
    with Image.open(files["0001-1.jpeg"]) as picture:
        assert picture.size == (512, 544)


def pretend(folder: Path, *arguments: str) -> list[str]:
    """What `srpo generate` would draw into a folder, which then has these files, and the record of them."""
    settings = parse(add_parameter_flags(), "generate", [*arguments, "-o", str(folder), "--model", "tiny"])
    work, output = plan_batch(settings)
    assert output.record is not None
    for item in work:
        for file in output.files(item):
            file.write_text(item.line["prompt"])
        with output.record.open("a") as record:
            record.write(json.dumps(item.record()) + "\n")
    return [name for item in work for name in item.names]


def test_another_prompt_replaces_no_picture(tmp_path: Path) -> None:
    assert pretend(tmp_path, "a cat") == ["0001.jpeg"]
    assert pretend(tmp_path, "a dog") == ["0002.jpeg"]
    assert (tmp_path / "0001.jpeg").read_text() == "a cat"
    for drawn in ("a cat", "a dog"):
        assert pretend(tmp_path, drawn) == []
    (tmp_path / "0004.png").write_text("the user's own")
    assert pretend(tmp_path, "a bird", "a dog", "a fish", "a fish") == ["0003.jpeg", "0005.jpeg", "0006.jpeg"]
    assert pretend(tmp_path, "a cat", "--num-images", "2") == ["0007-1.jpeg", "0007-2.jpeg"]
    (tmp_path / "0002.jpeg").unlink()
    assert pretend(tmp_path, "a cat", "a dog") == ["0002.jpeg"]


def test_the_last_line_of_the_record_says_whose_a_picture_is(tmp_path: Path) -> None:
    """A changed line of a file is drawn in its place, and so is one that was changed back."""
    file = tmp_path / "in.jsonl"
    for prompt in ("a cat", "a dog", "a cat"):
        file.write_text(json.dumps({"prompt": prompt}))
        assert pretend(tmp_path / "out", "--jsonl", str(file)) == ["0001.jpeg"]
        assert (tmp_path / "out" / "0001.jpeg").read_text() == prompt
        assert pretend(tmp_path / "out", "--jsonl", str(file)) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to draw"),
        (("a", "b", "-o", "x.png"), "2 requests do not fit one file"),
        (("a", "--seed", "0"), "request 1: seed: expected an integer from 1 to"),
        (("a", "--image-size", "1000x1000"), "image_size.width: expected a multiple of 32"),
        (("a", "--acceleration", "warp"), "acceleration: expected one of none, regular, high"),
        (("a", "--strength", "0.5"), "--strength needs a picture"),
        (("a", "--image", "missing.png"), "there is no file missing.png"),
        (("a", "--num_inference_steps=99"), "num_inference_steps: expected an integer from 1 to 50"),
        (("a", "-o", "x.bmp"), "must end in one of .jpg, .jpeg, .png, .webp, not in .bmp"),
        (("--jsonl", "missing.jsonl"), "generate: missing.jsonl: No such file or directory"),
        (("--jsonl", "broken.jsonl"), "broken.jsonl, line 3: not JSON"),
        (("--jsonl", "list.jsonl"), "list.jsonl, line 1: expected a JSON object"),
        pytest.param(("a", "--model", "flux/srpo"), "flux/srpo is not complete", marks=pytest.mark.long),  # a worker's
        (("--jsonl", "requests.jsonl"), "--jsonl: requests.jsonl is where the record of what is drawn"),
        (("--jsonl", "other.jsonl"), "requests.jsonl is not the record that srpo generate keeps"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": ')
    (tmp_path / "list.jsonl").write_text("[]")
    if "--jsonl" in arguments:
        for name in ("requests.jsonl", "other.jsonl"):
            (tmp_path / name).write_text('{"prompt": "a"}\n')
    ended = srpo("generate", *arguments, SRPO_MODEL="tiny")
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert not (tmp_path / "x.bmp").exists()


@pytest.mark.long
def test_json_on_stdout_and_pictures_on_the_terminal(tmp_path: Path) -> None:
    fast = ("--num-inference-steps", "6", "--image-size", "square", "--num-images", "2")
    ended = generate(
        tmp_path, "a cat", "-o", "cat.png", "--seed", "4", "--json", "--preview", *fast, COLORTERM="truecolor"
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["files"] == ["cat-1.png", "cat-2.png"]
    assert (told["seed"], told["has_nsfw_concepts"]) == (4, [False, False])
    assert told["timings"]["inference"] > 0
    lines = ended.stderr.count("\033[0m\n")  # two pixels a character: 3 previews of 32 by 32 an image, then 48 by 48
    assert lines == 2 * (3 * 16 + 24)


def test_preview_says_when_the_terminal_cannot(tmp_path: Path) -> None:
    ended = srpo("generate", "a cat", "-o", str(tmp_path / "cat.png"), "--preview", "--model", "tiny")
    assert ended.returncode == 2
    assert "not known to show images" in ended.stderr


@pytest.mark.parametrize(
    ("environment", "begins"),
    [
        ({"TERM": "xterm-kitty", "COLORTERM": "truecolor"}, "\033_Gf=100"),
        ({"TERM_PROGRAM": "iTerm.app"}, "\033]1337;File=inline=1"),
        ({"COLORTERM": "24bit"}, "\033[38;2;255;0;0m\033[48;2;0;0;255m▀"),
    ],
)
def test_each_terminal_is_shown_pictures_in_its_own_way(environment: dict[str, str], begins: str) -> None:
    picture = Image.new("RGB", (2, 2), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 1, 2, 2))
    show = choose_renderer(environment)
    assert show is not None
    assert show(picture).startswith(begins)
    assert choose_renderer({"TERM": "dumb"}) is None


@pytest.mark.long
def test_a_picture_becomes_the_servers_picture(tmp_path: Path, live: LiveServer) -> None:
    Image.effect_noise((512, 544), 60).convert("RGB").save(tmp_path / "harbour.png")
    flags = ("--strength", "0.5", "--num-inference-steps", "2", "--seed", "9")
    ended = generate(tmp_path, "in winter", "--image", "harbour.png", "-o", "out", "--format", "png", *flags)
    assert ended.returncode == 0, ended.stderr
    data = base64.b64encode((tmp_path / "harbour.png").read_bytes()).decode()
    reply = live.generate(
        model="flux/srpo/image-to-image", prompt="in winter", image_url=f"data:image/png;base64,{data}", strength=0.5,
        num_inference_steps=2, seed=9, output_format="png",
    )  # fmt: skip
    assert (tmp_path / "out" / "0001.png").read_bytes() == httpx.get(reply.json()["images"][0]["url"]).content
    again = generate(tmp_path, "in winter", "--image", "harbour.png", "-o", "out", "--format", "png", *flags)
    assert "everything is drawn already" in again.stderr


def test_brackets_in_a_failure_end_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich takes [/x] for the end of a style that nobody began, and raises."""
    monkeypatch.setattr(command.logs, "configure", lambda _: None)
    monkeypatch.setattr(command, "WorkerPool", lambda *_, **__: InstantPool(EngineConfig(), draw_black))
    lines = [{"prompt": "a", "image": "bad.png"}, {"prompt": "b"}]
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    flags = ["--jsonl", "in.jsonl", "-o", "out[/x]", "--model", "tiny", "--safety-checker", "none"]
    assert command.main(flags) == 1
    assert "not drawn: out[/x]/0001.jpeg: it is not a PNG" in capsys.readouterr().err
    assert (tmp_path / "out[" / "x]" / "0002.jpeg").exists()


def test_brackets_in_a_failure_end_no_batch_of_several_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoBucket:
        def __init__(self, *_: object) -> None: ...
        def write_failures(self, _: Path) -> None: ...

    outcomes = [{"line": 1, "error": "[/x].png: no picture"}, {"line": 2, "files": ["b"], "seed": 1, "new": True}]
    monkeypatch.setenv(offline.ADDRESS, "nowhere")
    monkeypatch.setattr(offline, "BatchBucket", NoBucket)
    monkeypatch.setattr(offline, "draw_lines", lambda *_: iter(outcomes))
    (tmp_path / "in.jsonl").write_text("{}\n{}\n")
    flags = ["--ray", "--jsonl", str(tmp_path / "in.jsonl"), "-o", "s3://pictures/of", "--model", "tiny"]
    assert offline.draw_file(parse(add_parameter_flags(), "generate", flags)) == 1
    printed = capsys.readouterr()
    assert "not drawn: request 1: [/x].png: no picture" in printed.err
    assert "s3://pictures/of/b (seed 1)" in printed.out


@pytest.mark.long
def test_a_line_may_name_its_picture_and_a_bad_one_is_told_alone(tmp_path: Path) -> None:
    Image.new("RGB", (512, 512), "teal").save(tmp_path / "good.webp")
    (tmp_path / "bad.png").write_text("no picture")
    lines = [{"prompt": "a", "image": "bad.png"}, {"prompt": "b", "image": "good.webp"}, {"prompt": "c"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = generate(tmp_path, "--jsonl", "in.jsonl", "-o", "out", *FAST)
    assert ended.returncode == 1
    assert "not drawn: out/0001.jpeg: it is not a PNG, JPEG or WebP picture" in ended.stderr
    with Image.open(tmp_path / "out" / "0002.jpeg") as sourced, Image.open(tmp_path / "out" / "0003.jpeg") as plain:
        assert (sourced.size, plain.size) == ((512, 512), (512, 544))
