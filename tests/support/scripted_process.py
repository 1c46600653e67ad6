"""A scripted server in a process of its own, which can be killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.server import START_LIMIT, wait_ready
from support.waiting import within

TESTS = Path(__file__).parent.parent
PROGRAM = """
import os, sys, time
from pathlib import Path
from server.usage import writer
from support.scripted_server import Scripted
writer.PATIENCE = 120  # seconds; else a disk that is busy lets a reply go before its usage is written
with Scripted(Path(sys.argv[1]), safety_checker=os.environ.get("SRPO_SAFETY_CHECKER", "none")) as server:
    port = Path(sys.argv[2])
    port.with_suffix(".new").write_text(str(server.port))
    port.with_suffix(".new").rename(port)
    time.sleep(3600)
"""


@dataclass
class ScriptedProcess:
    url: str
    process: subprocess.Popen[str]


@contextmanager
def scripted_process(folder: Path, **settings: str) -> Iterator[ScriptedProcess]:
    """It is killed at the end. `settings` are SRPO_* variables."""
    variables = {f"SRPO_{name.upper()}": value for name, value in settings.items()}
    env = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"} | variables
    log, port = folder.with_suffix(".log"), folder.with_suffix(".port")
    port.unlink(missing_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(folder), str(port)]
    with log.open("a") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
    try:
        assert within(START_LIMIT, lambda: port.exists() or process.poll() is not None)
        assert port.exists(), log.read_text()
        server = ScriptedProcess(f"http://127.0.0.1:{port.read_text()}", process)
        wait_ready(server.url, process, log)
        yield server
    finally:
        process.kill()
        process.wait()
