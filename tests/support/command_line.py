"""`srpo` in the test's own process, where what it needs is imported already."""

import io
import os
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import pytest

from pipelines import logs
from server.__main__ import main

LEFT_OUT = ("SRPO_", "AWS_", "TERM", "COLORTERM", "KITTY_")  # what whoever runs the tests has set for themselves


def srpo(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What `srpo` with these arguments and environment variables prints, and its exit code.

    For commands that leave the process as it was: a server would take its umask and its signals. Where this process
    logs is not changed, so what other threads log is printed too.
    """
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        for name in list(os.environ):
            if name.startswith(LEFT_OUT):
                patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(logs, "configure", lambda _: None)
        code: str | int | None
        try:
            code = main([*arguments])
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())
