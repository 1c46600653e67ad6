"""Backups as the page makes them, and every event of the log explained on it."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.jobs import PREFER, call
from support.ledgers import opened
from support.pages import PAGES, ROOT, blocks
from support.scripted_server import Scripted

from server.security.store import KeyStore

PAGE = "docs/upkeep.md"
PATH = "/v1/images/generations"
BODY = {"model": "flux/srpo", "prompt": "x", "image_size": "square", "num_inference_steps": 2, "seed": 7}
WRITERS = ("log.warning", "log.error", "log.critical", "self._log", "self._replace")  # the last two pass the event on


def test_a_backup_of_a_running_server_brings_back_keys_jobs_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    with Scripted(tmp_path / "data", safety_checker="none") as server:
        with opened(tmp_path / "data") as database:
            _, key = KeyStore(database).add("alice")
        (tmp_path / "data/engine.json").write_text("{}")  # a scripted engine measures nothing
        server.until(lambda: httpx.get(f"{server.url}/v1/jobs").status_code == 401)  # it has read the key
        job = call(server, "POST", PATH, key, json=BODY, headers=PREFER).json()["id"]
        server.until(lambda: call(server, "GET", f"/v1/jobs/{job}", key).json()["status"] == "succeeded")
        (commands,) = [block.text for block in blocks(PAGE, "sh") if "backup" in block.text]
        subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "backup").rename(tmp_path / "data")
    with Scripted(tmp_path / "data", safety_checker="none") as server:
        restored = call(server, "GET", f"/v1/jobs/{job}", key).json()
        assert restored["status"] == "succeeded"
        name = restored["reply"]["images"][0]["url"].rpartition("/")[2]
        assert call(server, "GET", f"/files/{name}", key).headers["content-type"] == "image/jpeg"
        assert call(server, "GET", "/v1/jobs", "another-key").status_code == 401


def events_of(path: Path) -> set[str]:
    """The events of warnings and errors that a module writes; a name that a variable holds is not seen here."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        first = node.args[0]
        if ast.unparse(node.func) in WRITERS and isinstance(first, ast.Constant):
            found.add(str(first.value))
    return found


def test_the_page_explains_every_warning_and_error_of_the_log_and_no_other() -> None:
    modules = [path for room in ("server", "pipelines", "weights") for path in (ROOT / room).rglob("*.py")]
    written = set().union(*map(events_of, modules))
    table = PAGES[PAGE].read_text().partition("| event |")[2].partition("\n\n")[0]
    explained = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(explained) == explained, "in the order of the alphabet"
    assert set(explained) == written
