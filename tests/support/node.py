"""The JavaScript clients, installed once from their lock file."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.clients import KEY

FOLDER = Path(__file__).parent.parent / "node"


OLDEST = 20


@pytest.fixture(scope="session")
def node() -> str:
    """Node's path."""
    path = shutil.which("node")
    if path is None or shutil.which("npm") is None:
        pytest.skip(f"the JavaScript clients need Node {OLDEST} and npm, which are not installed")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST:
        pytest.skip(f"the JavaScript clients need Node {OLDEST}, and this is {version}")
    return path


@pytest.fixture(scope="session")
def clients(node: str) -> str:
    """Node's path, with the clients of the lock file installed."""
    wanted = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()
    mark = FOLDER / "node_modules" / ".installed"
    with FileLock(FOLDER / "install.partial"):  # other processes of one run want them too
        if not mark.exists() or mark.read_text() != wanted:
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
            ended = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=600)
            assert ended.returncode == 0, f"npm could not install the clients:\n{ended.stderr}"
            mark.write_text(wanted)
    return node


def ask(node: str, client: str, url: str, key: str = KEY, retries: int = 0, **fields: Any) -> dict[str, Any]:
    """What the script prints for one request."""
    request = {"client": client, "url": url, "key": key, "maxRetries": retries, "fields": fields}
    ended = subprocess.run(
        [node, FOLDER / "clients.mjs", json.dumps(request)], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    outcome: dict[str, Any] = json.loads(ended.stdout)
    return outcome
