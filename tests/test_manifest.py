"""A damaged `manifest.json`, and one of another program: what each command that reads it says."""

import json
from pathlib import Path

import pytest
import torch
from support.written_formats import TINY, WRITTEN

from server.__main__ import main as srpo
from weights.checkpoints import CHECKPOINTS, SAFETY, CheckpointFiles
from weights.digests import hash_file
from weights.errors import BrokenManifest
from weights.formats.architecture import tensor_shapes
from weights.hub.manifest import check_pulled
from weights.manifest import MANIFEST

FILE = {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}  # of "abc"
WHOLE = {"repository": "a/b", "revision": "c" * 40, "licence": "none", "tool": "srpo-server 0", "files": {"file": FILE}}
BROKEN = {
    "cut off": json.dumps(WHOLE)[:80],
    "no object": "3",
    "no files": json.dumps({key: value for key, value in WHOLE.items() if key != "files"}),
    "a size in words": json.dumps(WHOLE | {"files": {"file": FILE | {"size": "3"}}}),
    "no digest": json.dumps(WHOLE | {"files": {"file": {"size": 3}}}),
    "a list of files": json.dumps(WHOLE | {"files": ["file"]}),
    "bytes": "\x00\x01",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the safety checker is pulled to."""
    made = tmp_path / SAFETY.folder
    made.mkdir()
    (made / "file").write_text("abc")
    return made


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_manifest_is_one_line_that_names_it(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / MANIFEST).write_text(BROKEN[case])
    said = f"{folder / MANIFEST} is damaged ("
    places = ["--models-dir", str(folder.parent)]
    assert srpo(["weights", "verify", "safety", *places]) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(said)
    assert line.endswith("). Move it away, and pull again: what is there is not fetched anew")
    mirror = ["--models-dir", str(folder.parent / "new"), "--offline", "--from", str(folder.parent)]
    assert srpo(["weights", "pull", "safety", *mirror]) == 1
    assert f"srpo weights pull: {said}" in capsys.readouterr().err
    with pytest.raises(BrokenManifest) as raised:
        check_pulled(CheckpointFiles(CHECKPOINTS["flux/srpo"], folder, None), whole=False)
    assert str(raised.value) == line


def test_a_damaged_manifest_beside_a_file_to_convert(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the new file's manifest would have no revision, and nobody would notice."""
    WRITTEN["diffusers"][1]({name: torch.zeros(shape) for name, shape in tensor_shapes(TINY).items()}, folder / "file")
    (folder / MANIFEST).write_text(BROKEN["cut off"])
    command = ["weights", "convert", str(folder / "file"), str(folder / "new"), "--to", "bf16"]
    assert srpo(command) == 2
    assert f"{folder / MANIFEST} is damaged" in capsys.readouterr().err.replace("\n", "")
    (folder / MANIFEST).write_text(json.dumps(WHOLE))
    assert srpo(command) == 0
    assert json.loads((folder / f"new.{MANIFEST}").read_text())["revision"] == WHOLE["revision"]


def test_another_programs_file_verifies_nothing_and_is_not_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = '{"name": "an app", "version": 3}'
    (folder / MANIFEST).write_text(theirs)
    places = ["--models-dir", str(folder.parent)]
    assert srpo(["weights", "verify", "safety", *places]) == 1
    assert "another program's" in capsys.readouterr().out
    mirror = folder.parent / "mirror" / SAFETY.folder
    mirror.mkdir(parents=True)
    for name in SAFETY.files:
        (mirror / name).write_text("abc")
    files = dict.fromkeys(SAFETY.files, FILE)
    (mirror / MANIFEST).write_text(json.dumps(WHOLE | {"files": files}))
    command = ["weights", "pull", "safety", "--offline", "--from", str(mirror.parent), *places]
    assert srpo(command) == 1
    assert f"{folder / MANIFEST} is another program's: move it away" in capsys.readouterr().err
    assert (folder / MANIFEST).read_text() == theirs
    (folder / MANIFEST).unlink()
    assert srpo(command) == 0
    assert hash_file(folder / "model.safetensors") == FILE["sha256"]
    assert srpo(["weights", "verify", "safety", *places]) == 0
