"""An empty network namespace: no network but loopback."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


NAMESPACE = ("unshare", "-rn", sys.executable, str(TESTS / "support" / "loopback_only.py"))


def permitted() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
