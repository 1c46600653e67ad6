"""Every image file says that a model made it; an independent reader, exiftool, finds the marks."""

import io
import json
import random
import shutil
import string
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.canaries import SLOTS, post

from pipelines.request import OUTPUT_FORMATS
from server.__main__ import main as srpo
from server.images.metadata import SOURCE_TYPE

PROMPT = 'a café, 猫: "two"\nlines \U0001f600'
needs_exiftool = pytest.mark.skipif(
    shutil.which("exiftool") is None, reason="exiftool is not installed (Debian: libimage-exiftool-perl)"
)


async def files(tmp_path: Path, slots: tuple[bool, ...] = (False,), **options: Any) -> list[bytes]:
    reply = await post(tmp_path / "data", slots, **({"prompt": PROMPT} | options))
    assert reply.status_code == 201, reply.text
    return list(reply.extensions["fetched"])


def exiftool(data: bytes) -> dict[str, str]:
    """What exiftool reads: the source type, the text, and what it finds wrong with the file."""
    names = ("-DigitalSourceType", "-Parameters", "-UserComment", "-Error", "-validate")
    ended = subprocess.run(["exiftool", "-json", "-n", *names, "-"], input=data, capture_output=True, check=True)
    read: dict[str, str] = json.loads(ended.stdout)[0]
    return read


@needs_exiftool
@pytest.mark.parametrize("format", OUTPUT_FORMATS)
async def test_exiftool_reads_the_mark_and_the_parameters(tmp_path: Path, format: str) -> None:
    first, second = await files(tmp_path, (False, False), output_format=format, seed=5, guidance_scale=3.5)
    for data, seed in ((first, 5), (second, 6)):
        read = exiftool(data)
        assert read["DigitalSourceType"] == SOURCE_TYPE
        assert "Error" not in read
        assert read.get("Parameters", read.get("UserComment")) == (
            f"{PROMPT}\nSteps: 28, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: {seed}, Size: 512x512, "
            "Model: flux/sketch, Version: srpo-server 0.1.0"
        )


@needs_exiftool
@pytest.mark.parametrize("format", OUTPUT_FORMATS)
async def test_without_parameters_the_mark_stays_and_the_prompt_is_nowhere(tmp_path: Path, format: str) -> None:
    secret = "".join(random.choices(string.ascii_lowercase, k=20))
    (data,) = await files(tmp_path, output_format=format, omit_parameters=True, prompt=secret)
    read = exiftool(data)
    assert read["DigitalSourceType"] == SOURCE_TYPE
    assert not {"Parameters", "UserComment"} & set(read)
    assert secret.encode() not in data
    assert secret.encode("utf-16-be") not in data


@pytest.mark.parametrize("format", OUTPUT_FORMATS)
async def test_the_same_request_gives_the_same_bytes(tmp_path: Path, format: str) -> None:
    both = [await files(tmp_path, (False, False), output_format=format, seed=7) for _ in range(2)]
    (alone,) = await files(tmp_path, output_format=format, seed=8)
    assert both[0] == both[1]
    assert both[0][1] == alone


@pytest.mark.parametrize("action", ["black", "blur"])
async def test_a_withheld_image_says_so_in_place_of_its_parameters(tmp_path: Path, action: str) -> None:
    pictures = [Image.open(io.BytesIO(data)) for data in await files(tmp_path, SLOTS, safety_action=action)]
    texts = [picture.info["parameters"] for picture in pictures]
    assert [text == "withheld by the safety checker" for text in texts] == list(SLOTS)
    assert all(SOURCE_TYPE in picture.info["XML:com.adobe.xmp"] for picture in pictures)


@pytest.mark.parametrize("format", OUTPUT_FORMATS)
async def test_verify_reads_back_what_was_written(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = await files(tmp_path, output_format=format, seed=5)
    ours, bare, broken = (tmp_path / f"{name}.{format}" for name in ("ours", "bare", "broken"))
    ours.write_bytes(data)
    Image.open(io.BytesIO(data)).convert("L").save(bare, xmp=b"", exif=b"")
    broken.write_bytes(data[: len(data) // 3])

    def verify(*arguments: Path) -> int:
        return srpo(["verify", *map(str, arguments)])

    assert verify(ours) == 0
    said = capsys.readouterr().out
    assert "trainedAlgorithmicMedia" in said
    assert "Seed: 5" in said
    assert "猫" in said
    assert verify(ours, bare) == 1
    assert "not marked" in capsys.readouterr().out
    assert verify(broken) == 2
    assert str(broken) in capsys.readouterr().err
    assert verify(tmp_path / "missing.png", tmp_path) == 2
    missing, folder = capsys.readouterr().err.splitlines()
    assert missing.endswith("missing.png: No such file or directory")
    assert folder.endswith(": Is a directory")
    broken.write_bytes(b"no picture")
    assert verify(broken) == 2
    assert capsys.readouterr().err == f"srpo verify: {broken}: not an image that can be read\n"


def test_verify_lets_no_file_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hostile.webp"
    hostile = b'<rdf:Description Iptc4xmpExt:DigitalSourceType="\x1b]0;owned\x07"/>'
    Image.new("RGB", (8, 8)).save(file, xmp=hostile)
    assert srpo(["verify", str(file)]) == 1
    assert "\x1b" not in capsys.readouterr().out
