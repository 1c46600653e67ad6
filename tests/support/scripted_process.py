"""A scripted server in a process of its own, which can be killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.server import wait_ready

TESTS = Path(__file__).parent.parent
PROGRAM = """
import os, sys, time
from pathlib import Path
from support.scripted_server import Scripted
with Scripted(Path(sys.argv[1]), safety_checker=os.environ.get("SRPO_SAFETY_CHECKER", "none")) as server:
    print(server.port, flush=True)
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
    log = folder.with_suffix(".log")
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)], env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        first = next((line for line in process.stdout if line.strip().isdecimal()), "")
        assert first, log.read_text()
        server = ScriptedProcess(f"http://127.0.0.1:{int(first)}", process)
        wait_ready(server.url, process, log)
        yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
