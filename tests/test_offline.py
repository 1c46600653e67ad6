"""The server needs no network: it starts, checks its images and answers where there is none but loopback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.namespaces import NAMESPACE, TESTS, permitted

GENERATE = """
import json, socket, sys
from pathlib import Path
import httpx
from support.server import running
try:
    socket.create_connection(("192.0.2.1", 80), 1)
    sys.exit("there is a network")
except OSError:
    pass
with running(Path(sys.argv[1])) as server:
    reply = server.generate(output_format="png", num_images=2).json()
    files = [httpx.get(item["url"]).content[:4].hex() for item in reply["images"]]
print(json.dumps({"files": files, "safety": reply["safety"]}))
"""


@pytest.mark.long
@pytest.mark.skipif(not permitted(), reason="this machine does not permit `unshare -rn` (user namespaces)")
def test_a_server_generates_in_an_empty_network_namespace(tmp_path: Path) -> None:
    command = [*NAMESPACE, sys.executable, "-c", GENERATE, str(tmp_path)]
    ended = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["files"] == [b"\x89PNG".hex()] * 2
    assert said["safety"]["checked"] is True
